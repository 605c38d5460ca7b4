-- The Settler schema, 1 of 5: tables and columns, on PostgreSQL 14 to 18.
--
-- It may run on an empty database, on any database that the old migration files left behind, and on its own result.
-- It changes the catalogue only and reads no row but to ask whether there is one: its locks are held for moments. What
-- takes time comes after, without a lock that anybody waits for: 002 gives rows their tenant, 003 builds the indexes, 004
-- adds the rules, 005 proves them for the rows that are there already. Functions, triggers, policies and statistics are
-- the repeatable files, which follow. Until they have run, a table without a policy shows the application nothing.
--
-- Timestamps are without time zone because live databases have them so. Everything here is plain PostgreSQL:
-- gen_random_uuid() is built in, no extension is called.

set local search_path = public, pg_temp;
set local client_min_messages = warning;


-- 1. Locks ------------------------------------------------------------------------------------------------------------
-- What is there is locked at once, children first as a writer does, before any work: a run that cannot have its locks
-- fails here, having done and blocked next to nothing, and may be tried again.

do $$
declare
  existing text;
begin
  select string_agg(format('public.%I', name), ', ' order by position desc) into existing
    from unnest(array[
      'tenants', 'users', 'api_keys', 'jobs', 'executions', 'matches', 'unmatched', 'reports',
      'webhooks', 'webhook_payloads', 'webhook_deliveries', 'webhook_configs', 'audit_logs', 'idempotency_keys',
      'revoked_tokens', 'blocked_ips', 'security_events', 'tenant_usage', 'tenant_quota_usage',
      'feature_flags', 'feature_flag_changes', 'event_store', 'snapshots', 'saga_state', 'dead_letter_queue',
      'reconciliation_summary', 'tenant_usage_view', 'error_hotspots_view'
    ]) with ordinality as wanted (name, position)
    where to_regclass('public.' || name) is not null;
  if existing is not null then
    execute 'lock table ' || existing || ' in access exclusive mode';
  end if;
end
$$;


-- 2. Tables -----------------------------------------------------------------------------------------------------------
-- Columns and primary keys only; 004 has every other rule, for new and old tables alike.

create table if not exists tenants (
  id uuid primary key default gen_random_uuid(),
  name varchar(255) not null,
  slug varchar(255) not null,
  parent_tenant_id uuid,
  tier varchar(50) not null default 'free',
  status varchar(50) not null default 'active',
  quotas jsonb not null default '{
    "rateLimitRpm": 1000,
    "storageBytes": 1073741824,
    "concurrentJobs": 5,
    "monthlyReconciliations": 1000,
    "customDomains": 0
  }',
  config jsonb not null default '{
    "customDomainVerified": false,
    "dataResidencyRegion": "us",
    "enableAdvancedMatching": false,
    "enableMLFeatures": false,
    "webhookTimeout": 30000,
    "maxRetries": 3
  }',
  metadata jsonb default '{}',
  created_at timestamp default now(),
  updated_at timestamp default now(),
  deleted_at timestamp
);

create table if not exists users (
  id uuid primary key default gen_random_uuid(),
  tenant_id uuid,
  email varchar(255) not null,
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

create table if not exists api_keys (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null,
  tenant_id uuid,
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

create table if not exists jobs (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null,
  tenant_id uuid,
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

create table if not exists executions (
  id uuid primary key default gen_random_uuid(),
  job_id uuid not null,
  tenant_id uuid,
  status varchar(50) default 'running',
  started_at timestamp default now(),
  completed_at timestamp,
  error text,
  summary jsonb,
  duration_ms bigint,
  created_at timestamp default now()
);

create table if not exists matches (
  id uuid primary key default gen_random_uuid(),
  execution_id uuid not null,
  job_id uuid not null,
  tenant_id uuid,
  source_id varchar(255) not null,
  target_id varchar(255) not null,
  amount numeric(10,2),
  currency varchar(10),
  confidence numeric(3,2),
  matched_at timestamp default now(),
  created_at timestamp default now()
);

create table if not exists unmatched (
  id uuid primary key default gen_random_uuid(),
  execution_id uuid not null,
  job_id uuid not null,
  tenant_id uuid,
  source_id varchar(255),
  target_id varchar(255),
  amount numeric(10,2),
  currency varchar(10),
  reason text,
  created_at timestamp default now()
);

create table if not exists reports (
  id uuid primary key default gen_random_uuid(),
  job_id uuid not null,
  execution_id uuid not null,
  tenant_id uuid,
  date_range_start timestamp,
  date_range_end timestamp,
  summary jsonb not null,
  generated_at timestamp default now(),
  created_at timestamp default now()
);

create table if not exists webhooks (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null,
  tenant_id uuid,
  url varchar(2048) not null,
  events text[] not null,
  secret varchar(255) not null,
  status varchar(50) default 'active',
  created_at timestamp default now(),
  updated_at timestamp default now()
);

create table if not exists webhook_payloads (
  id uuid primary key default gen_random_uuid(),
  adapter varchar(100) not null,
  tenant_id uuid,
  payload jsonb not null,
  signature varchar(255),
  received_at timestamp default now(),
  processed boolean default false,
  processed_at timestamp,
  error text,
  created_at timestamp default now()
);

create table if not exists webhook_deliveries (
  id uuid primary key default gen_random_uuid(),
  webhook_id uuid not null,
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

create table if not exists webhook_configs (
  adapter varchar(100) primary key,
  secret varchar(255) not null,
  signature_algorithm varchar(50) default 'hmac-sha256',
  created_at timestamp default now(),
  updated_at timestamp default now()
);

create table if not exists audit_logs (
  id uuid primary key default gen_random_uuid(),
  tenant_id uuid,
  event varchar(100) not null,
  user_id uuid,
  api_key_id uuid,
  ip varchar(45),
  user_agent text,
  method varchar(10),
  path varchar(500),
  status_code integer,
  metadata jsonb,
  timestamp timestamp default now()
);

create table if not exists idempotency_keys (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null,
  tenant_id uuid,
  key varchar(255) not null,
  response jsonb not null,
  created_at timestamp default now(),
  expires_at timestamp not null
);

create table if not exists revoked_tokens (
  jti varchar(255) primary key,
  revoked_at timestamp default now(),
  reason text,
  expires_at timestamp not null,
  created_at timestamp default now()
);

create table if not exists blocked_ips (
  id uuid primary key default gen_random_uuid(),
  ip varchar(45) not null,
  reason text not null,
  tenant_id uuid,
  blocked_at timestamp default now(),
  unblocked_at timestamp,
  created_at timestamp default now()
);

create table if not exists security_events (
  id uuid primary key default gen_random_uuid(),
  event_type varchar(100) not null,
  severity varchar(20) not null,
  tenant_id uuid,
  user_id uuid,
  api_key_id uuid,
  ip varchar(45),
  user_agent text,
  details jsonb,
  resolved boolean default false,
  resolved_at timestamp,
  resolved_by uuid,
  created_at timestamp default now()
);

create table if not exists tenant_usage (
  id uuid primary key default gen_random_uuid(),
  tenant_id uuid not null,
  metric_type varchar(50) not null,
  metric_value bigint not null default 0,
  period_start timestamp not null,
  period_end timestamp not null,
  created_at timestamp default now()
);

create table if not exists tenant_quota_usage (
  tenant_id uuid primary key,
  current_storage_bytes bigint default 0,
  current_concurrent_jobs integer default 0,
  current_monthly_reconciliations integer default 0,
  last_reset_at timestamp default now(),
  updated_at timestamp default now()
);

create table if not exists feature_flags (
  id uuid primary key default gen_random_uuid(),
  name varchar(255) not null,
  description text,
  enabled boolean default false,
  rollout_percentage integer default 0,
  tenant_id uuid,
  user_id uuid,
  conditions jsonb default '{}',
  created_at timestamp default now(),
  updated_at timestamp default now(),
  deleted_at timestamp
);

create table if not exists feature_flag_changes (
  id uuid primary key default gen_random_uuid(),
  feature_flag_id uuid not null,
  changed_by uuid,
  old_value jsonb,
  new_value jsonb,
  reason text,
  created_at timestamp default now()
);

create table if not exists event_store (
  id bigserial primary key,
  event_id uuid not null,
  aggregate_id uuid not null,
  aggregate_type varchar(100) not null,
  event_type varchar(100) not null,
  event_version integer not null default 1,
  data jsonb not null,
  metadata jsonb not null default '{}',
  tenant_id uuid,
  created_at timestamp not null default now()
);

create table if not exists snapshots (
  id bigserial primary key,
  aggregate_id uuid not null,
  aggregate_type varchar(100) not null,
  snapshot_data jsonb not null,
  snapshot_version integer not null,
  event_id uuid not null,
  tenant_id uuid,
  created_at timestamp not null default now()
);

create table if not exists saga_state (
  id uuid primary key default gen_random_uuid(),
  saga_id varchar(255) not null,
  saga_type varchar(100) not null,
  aggregate_id uuid not null,
  current_step varchar(100) not null,
  state jsonb not null default '{}',
  status varchar(50) not null default 'running',
  error_message text,
  retry_count integer default 0,
  max_retries integer default 3,
  next_retry_at timestamp,
  timeout_at timestamp,
  tenant_id uuid,
  correlation_id uuid,
  created_at timestamp not null default now(),
  updated_at timestamp not null default now(),
  completed_at timestamp
);

create table if not exists dead_letter_queue (
  id uuid primary key default gen_random_uuid(),
  saga_id varchar(255),
  event_id uuid,
  error_type varchar(100) not null,
  error_message text not null,
  error_stack text,
  payload jsonb not null,
  retry_count integer default 0,
  max_retries integer default 3,
  tenant_id uuid,
  correlation_id uuid,
  created_at timestamp not null default now(),
  resolved_at timestamp,
  resolution_notes text
);

create table if not exists reconciliation_summary (
  reconciliation_id uuid primary key,
  job_id uuid not null,
  status varchar(50) not null default 'running',
  total_source_records integer default 0,
  total_target_records integer default 0,
  matched_count integer default 0,
  unmatched_source_count integer default 0,
  unmatched_target_count integer default 0,
  errors_count integer default 0,
  started_at timestamp not null default now(),
  completed_at timestamp,
  duration_ms bigint,
  accuracy_percentage numeric(5,2),
  tenant_id uuid,
  updated_at timestamp not null default now()
);

create table if not exists tenant_usage_view (
  tenant_id uuid not null,
  date date not null,
  reconciliation_count integer default 0,
  total_duration_ms bigint default 0,
  success_count integer default 0,
  failure_count integer default 0,
  primary key (tenant_id, date)
);

create table if not exists error_hotspots_view (
  reconciliation_id uuid not null,
  job_id uuid not null,
  error_type varchar(100) not null,
  error_count integer default 1,
  step varchar(100) not null,
  first_occurred_at timestamp not null default now(),
  last_occurred_at timestamp not null default now(),
  tenant_id uuid,
  primary key (reconciliation_id, error_type, step)
);

-- For what only the owner and the functions use: the application has no right on this schema.
create schema if not exists private;


-- 3. The column that the oldest databases lack ------------------------------------------------------------------------
-- Where no table knows tenants yet, every row is the default tenant's: a column with a constant default costs nothing,
-- however large the table. Otherwise the column comes empty, and 002 fills it.

do $$
declare
  default_tenant constant uuid := '00000000-0000-4000-8000-000000000001';
  oldest constant regclass[] := array[
    'users', 'api_keys', 'jobs', 'executions', 'matches', 'unmatched', 'reports', 'webhooks',
    'webhook_payloads', 'audit_logs', 'idempotency_keys'
  ];
  relation regclass;
  has_rows boolean;
begin
  if exists (
    select from pg_attribute where attrelid = any (oldest) and attname = 'tenant_id' and not attisdropped
  ) then
    return;
  end if;
  foreach relation in array oldest loop
    execute format('select exists (select from %s)', relation) into has_rows;
    if has_rows then
      insert into tenants (id, name, slug) select default_tenant, 'Default Tenant', 'default'
        where not exists (select from tenants where id = default_tenant);
      execute format('alter table %s add column tenant_id uuid default %L', relation, default_tenant);
      execute format('alter table %s alter column tenant_id drop default', relation);
    end if;
  end loop;
end
$$;

alter table users add column if not exists tenant_id uuid;
alter table api_keys add column if not exists tenant_id uuid;
alter table jobs add column if not exists tenant_id uuid;
alter table executions add column if not exists tenant_id uuid;
alter table matches add column if not exists tenant_id uuid;
alter table unmatched add column if not exists tenant_id uuid;
alter table reports add column if not exists tenant_id uuid;
alter table webhooks add column if not exists tenant_id uuid;
alter table webhook_payloads add column if not exists tenant_id uuid;
alter table audit_logs add column if not exists tenant_id uuid;
alter table idempotency_keys add column if not exists tenant_id uuid;


-- 4. Row level security -----------------------------------------------------------------------------------------------
-- On all tables, for every role but the owner, who must see all rows for backups and migrations (no FORCE).

alter table tenants enable row level security, no force row level security;
alter table users enable row level security, no force row level security;
alter table api_keys enable row level security, no force row level security;
alter table jobs enable row level security, no force row level security;
alter table executions enable row level security, no force row level security;
alter table matches enable row level security, no force row level security;
alter table unmatched enable row level security, no force row level security;
alter table reports enable row level security, no force row level security;
alter table webhooks enable row level security, no force row level security;
alter table webhook_payloads enable row level security, no force row level security;
alter table webhook_deliveries enable row level security, no force row level security;
alter table webhook_configs enable row level security, no force row level security;
alter table audit_logs enable row level security, no force row level security;
alter table idempotency_keys enable row level security, no force row level security;
alter table revoked_tokens enable row level security, no force row level security;
alter table blocked_ips enable row level security, no force row level security;
alter table security_events enable row level security, no force row level security;
alter table tenant_usage enable row level security, no force row level security;
alter table tenant_quota_usage enable row level security, no force row level security;
alter table feature_flags enable row level security, no force row level security;
alter table feature_flag_changes enable row level security, no force row level security;
alter table event_store enable row level security, no force row level security;
alter table snapshots enable row level security, no force row level security;
alter table saga_state enable row level security, no force row level security;
alter table dead_letter_queue enable row level security, no force row level security;
alter table reconciliation_summary enable row level security, no force row level security;
alter table tenant_usage_view enable row level security, no force row level security;
alter table error_hotspots_view enable row level security, no force row level security;

-- These two get no policy.
comment on table webhook_configs is
  'No policy: a tenant session has no access, only get_webhook_config().';
comment on table revoked_tokens is
  'No policy: a tenant session has no access, only is_token_revoked(), revoke_token() and '
  'cleanup_expired_revoked_tokens().';

-- Any tenant could read these. Their successors are in the schema private.
drop materialized view if exists
  public.mv_reconciliation_summary_daily, public.mv_job_performance,
  public.mv_tenant_usage_hourly, public.mv_match_accuracy_by_job;
