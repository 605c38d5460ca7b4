-- The oldest databases: one customer each, no tenants. An email is unique in the whole database.

create table users (
  id uuid primary key default gen_random_uuid(),
  email varchar(255) unique not null,
  password_hash varchar(255) not null,
  name varchar(255),
  role varchar(50) default 'developer',
  data_residency_region varchar(10) default 'us',
  data_retention_days integer default 365,
  deleted_at timestamp,
  deletion_scheduled_at timestamp,
  created_at timestamp default now(),
  updated_at timestamp default now()
);
create index idx_users_email on users (email);

create table api_keys (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references users (id) on delete cascade,
  key_prefix varchar(20) not null,
  key_hash varchar(255) not null,
  name varchar(255),
  scopes text[] default array['jobs:read', 'jobs:write', 'reports:read'],
  rate_limit integer default 1000,
  ip_whitelist text[],
  revoked_at timestamp,
  expires_at timestamp,
  last_used_at timestamp,
  created_at timestamp default now(),
  updated_at timestamp default now()
);
create index idx_api_keys_prefix on api_keys (key_prefix);
create index idx_api_keys_user_id on api_keys (user_id);

create table jobs (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references users (id) on delete cascade,
  name varchar(255) not null,
  source_adapter varchar(100) not null,
  source_config_encrypted text not null,
  target_adapter varchar(100) not null,
  target_config_encrypted text not null,
  rules jsonb not null,
  schedule varchar(100),
  status varchar(50) default 'active',
  version integer default 1,
  created_at timestamp default now(),
  updated_at timestamp default now()
);
create index idx_jobs_user_id on jobs (user_id);

create table executions (
  id uuid primary key default gen_random_uuid(),
  job_id uuid not null references jobs (id) on delete cascade,
  status varchar(50) default 'running',
  started_at timestamp default now(),
  completed_at timestamp,
  error text,
  summary jsonb,
  duration_ms bigint,
  created_at timestamp default now()
);
create index idx_executions_job_id on executions (job_id);

create table matches (
  id uuid primary key default gen_random_uuid(),
  execution_id uuid not null references executions (id) on delete cascade,
  job_id uuid not null references jobs (id) on delete cascade,
  source_id varchar(255) not null,
  target_id varchar(255) not null,
  amount numeric(10,2),
  currency varchar(10),
  confidence numeric(3,2),
  matched_at timestamp default now(),
  created_at timestamp default now()
);
create index idx_matches_job_id on matches (job_id);
create index idx_matches_execution_id on matches (execution_id);

create table unmatched (
  id uuid primary key default gen_random_uuid(),
  execution_id uuid not null references executions (id) on delete cascade,
  job_id uuid not null references jobs (id) on delete cascade,
  source_id varchar(255),
  target_id varchar(255),
  amount numeric(10,2),
  currency varchar(10),
  reason text,
  created_at timestamp default now()
);
create index idx_unmatched_job_id on unmatched (job_id);
create index idx_unmatched_execution_id on unmatched (execution_id);

create table reports (
  id uuid primary key default gen_random_uuid(),
  job_id uuid not null references jobs (id) on delete cascade,
  execution_id uuid not null references executions (id) on delete cascade,
  date_range_start timestamp,
  date_range_end timestamp,
  summary jsonb not null,
  generated_at timestamp default now(),
  created_at timestamp default now()
);
create index idx_reports_job_id on reports (job_id);
create index idx_reports_execution_id on reports (execution_id);

create table webhooks (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references users (id) on delete cascade,
  url varchar(2048) not null,
  events text[] not null,
  secret varchar(255) not null,
  status varchar(50) default 'active',
  created_at timestamp default now(),
  updated_at timestamp default now()
);
create index idx_webhooks_user_id on webhooks (user_id);

create table webhook_payloads (
  id uuid primary key default gen_random_uuid(),
  adapter varchar(100) not null,
  payload jsonb not null,
  signature varchar(255),
  received_at timestamp default now(),
  processed boolean default false,
  processed_at timestamp,
  error text,
  created_at timestamp default now()
);

create table webhook_deliveries (
  id uuid primary key default gen_random_uuid(),
  webhook_id uuid not null references webhooks (id) on delete cascade,
  url varchar(2048) not null,
  payload jsonb not null,
  status varchar(50),
  status_code integer,
  response_body text,
  attempts integer default 0,
  next_retry_at timestamp,
  delivered_at timestamp,
  created_at timestamp default now()
);
create index idx_webhook_deliveries_webhook_id on webhook_deliveries (webhook_id);

create table webhook_configs (
  adapter varchar(100) primary key,
  secret varchar(255) not null,
  signature_algorithm varchar(50) default 'hmac-sha256',
  created_at timestamp default now(),
  updated_at timestamp default now()
);

create table audit_logs (
  id uuid primary key default gen_random_uuid(),
  event varchar(100) not null,
  user_id uuid references users (id) on delete set null,
  api_key_id uuid references api_keys (id) on delete set null,
  ip varchar(45),
  user_agent text,
  method varchar(10),
  path varchar(500),
  status_code integer,
  metadata jsonb,
  timestamp timestamp default now()
);
create index idx_audit_logs_user_id on audit_logs (user_id);

create table idempotency_keys (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references users (id) on delete cascade,
  key varchar(255) not null,
  response jsonb not null,
  created_at timestamp default now(),
  expires_at timestamp not null
);
create unique index idx_idempotency_user_key on idempotency_keys (user_id, key);
create index idx_idempotency_expires on idempotency_keys (expires_at);
