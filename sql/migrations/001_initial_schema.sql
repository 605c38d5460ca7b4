-- The Settler schema: tables, rules, functions, row level security and statistics, on PostgreSQL 14 to 18.
--
-- It runs in one transaction as the role that owns the database and every object in it. It may run on an empty
-- database, on any database that the old migration files left behind, and on its own result, where it changes nothing.
-- What exists already is looked up in the catalogue first, so that a second run takes no lock on a table that a
-- query waits for.
--
-- Timestamps are without time zone because live databases have them so. Everything here is plain PostgreSQL:
-- gen_random_uuid() is built in, no extension is called.

-- An old database gets a tenant for each row that has none.
-- runbook: changes=tenants,users.tenant_id,api_keys.tenant_id,jobs.tenant_id,executions.tenant_id,matches.tenant_id
-- runbook: changes=unmatched.tenant_id,reports.tenant_id,webhooks.tenant_id,idempotency_keys.tenant_id
-- runbook: changes=webhook_payloads.tenant_id,audit_logs.tenant_id,event_store.tenant_id,snapshots.tenant_id
-- runbook: changes=saga_state.tenant_id,dead_letter_queue.tenant_id,reconciliation_summary.tenant_id
-- runbook: changes=error_hotspots_view.tenant_id

set local search_path = public, pg_temp;
set local client_min_messages = warning;


-- 1. Locks ------------------------------------------------------------------------------------------------------------
-- An old database is locked at once, parents first, before any work: a run that cannot have its locks fails here,
-- having done and blocked next to nothing, and may be tried again.
-- The policy on tenants tells old from new in this file: no older migration ever made one.

do $$
declare
  existing text;
begin
  if exists (select from pg_policy where polname = 'tenant_isolation_tenants') then
    return;
  end if;
  select string_agg(format('public.%I', name), ', ' order by position) into existing
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
-- Columns and primary keys only. Every other rule is in section 4, which serves new and old tables alike.

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


-- 3. A tenant for the rows of an old database -------------------------------------------------------------------------
-- A row takes the tenant of the row that it belongs to. Rows that belong to none go to the tenant with slug «default»,
-- which is made only if such a row exists. NULL stays in feature_flags, blocked_ips and security_events: there it means
-- «everyone». None of this touches a database that has passed here before: a NULL in audit_logs is then a deleted
-- tenant's, and must not be given to another one.

do $$
declare
  default_tenant uuid := '00000000-0000-4000-8000-000000000001';
  make_default_tenant constant text :=
    'insert into tenants (id, name, slug) select $1, ''Default Tenant'', ''default''
       where not exists (select from tenants where slug = ''default'')';
  oldest constant text[] := array[
    'users', 'api_keys', 'jobs', 'executions', 'matches', 'unmatched', 'reports', 'webhooks',
    'webhook_payloads', 'audit_logs', 'idempotency_keys'
  ];
  has_tenants constant boolean := exists (
    select from pg_attribute
      where attrelid = any (oldest::regclass[]) and attname = 'tenant_id' and not attisdropped
  );
  relation regclass;
  step record;
  found_rows boolean;
begin
  if exists (select from pg_policy where polname = 'tenant_isolation_tenants') then
    return;
  end if;

  -- The owner must see every row, here and in every backup.
  for relation in
    select oid from pg_class where relnamespace = 'public'::regnamespace and relforcerowsecurity
  loop
    execute format('alter table %s no force row level security', relation);
  end loop;

  default_tenant := coalesce((select id from tenants where slug = 'default'), default_tenant);

  -- Where no table knows tenants yet, every row is the default tenant's: a column with a constant default costs
  -- nothing, however large the table. Otherwise the column comes empty, and the steps below fill it.
  for relation in
    select name::regclass
      from unnest(oldest || array[
        'blocked_ips', 'security_events', 'feature_flags', 'event_store', 'snapshots', 'saga_state',
        'dead_letter_queue', 'reconciliation_summary', 'error_hotspots_view'
      ]) with ordinality as wanted (name, position)
      where not exists (
        select from pg_attribute
          where attrelid = name::regclass and attname = 'tenant_id' and not attisdropped
      )
      order by position
  loop
    found_rows := false;
    if not has_tenants and relation = any (oldest::regclass[]) then
      execute format('select exists (select from %s)', relation) into found_rows;
    end if;
    if found_rows then
      execute make_default_tenant using default_tenant;
      execute format('alter table %s add column tenant_id uuid default %L', relation, default_tenant);
      execute format('alter table %s alter column tenant_id drop default', relation);
    else
      execute format('alter table %s add column tenant_id uuid', relation);
    end if;
  end loop;

  for step in
    select * from (values
      (1, 'users', null, null),
      (2, 'api_keys', 'users', 'user_id'),
      (3, 'jobs', 'users', 'user_id'),
      (4, 'executions', 'jobs', 'job_id'),
      (5, 'matches', 'executions', 'execution_id'),
      (6, 'unmatched', 'executions', 'execution_id'),
      (7, 'reports', 'executions', 'execution_id'),
      (8, 'webhooks', 'users', 'user_id'),
      (9, 'idempotency_keys', 'users', 'user_id'),
      (10, 'webhook_payloads', null, null),
      (11, 'audit_logs', 'users', 'user_id'),
      (12, 'audit_logs', 'api_keys', 'api_key_id'),
      (13, 'audit_logs', null, null),
      (14, 'event_store', 'jobs', 'aggregate_id'),
      (15, 'event_store', 'executions', 'aggregate_id'),
      (16, 'event_store', null, null),
      (17, 'snapshots', 'event_store', 'event_id'),
      (18, 'saga_state', 'jobs', 'aggregate_id'),
      (19, 'saga_state', 'executions', 'aggregate_id'),
      (20, 'saga_state', null, null),
      (21, 'dead_letter_queue', 'event_store', 'event_id'),
      (22, 'dead_letter_queue', null, null),
      (23, 'reconciliation_summary', 'jobs', 'job_id'),
      (24, 'reconciliation_summary', null, null),
      (25, 'error_hotspots_view', 'reconciliation_summary', 'reconciliation_id'),
      (26, 'error_hotspots_view', 'jobs', 'job_id'),
      (27, 'error_hotspots_view', null, null)
    ) as wanted (position, child, parent, link)
    order by position
  loop
    execute format('select exists (select from %I where tenant_id is null)', step.child) into found_rows;
    if not found_rows then
      continue;
    end if;
    if step.parent is not null then
      execute format(
        'update %1$I as child set tenant_id = parent.tenant_id from %2$I as parent
           where child.tenant_id is null and parent.tenant_id is not null and parent.%4$I = child.%3$I',
        step.child, step.parent, step.link,
        case when step.link in ('event_id', 'reconciliation_id') then step.link else 'id' end
      );
    else
      execute make_default_tenant using default_tenant;
      execute format('update %I set tenant_id = $1 where tenant_id is null', step.child) using default_tenant;
    end if;
  end loop;
end
$$;


-- 4. Rules between rows -----------------------------------------------------------------------------------------------
-- A rule is added where the table has none of the same meaning; one of the same name with another meaning gives way.

-- What a rule with NULLs let in twice is for a person to sort out: no row is dropped or changed here.
do $$
declare
  twice text;
begin
  if exists (select from pg_policy where polname = 'tenant_isolation_tenants') then
    return;
  end if;
  select string_agg(what, '; ') into twice from (
    select format('users: %L in tenant %s, %s times', email, coalesce(tenant_id::text, '(none)'), count(*)) as what
      from users group by tenant_id, email having count(*) > 1
    union all
    select format('feature_flags: %L for tenant %s and user %s, %s times', name,
                  coalesce(tenant_id::text, '(all)'), coalesce(user_id::text, '(all)'), count(*))
      from feature_flags group by name, tenant_id, user_id having count(*) > 1
    union all
    select format('blocked_ips: active block of %s for tenant %s, %s times', ip,
                  coalesce(tenant_id::text, '(all)'), count(*))
      from blocked_ips where unblocked_at is null group by ip, tenant_id having count(*) > 1
    limit 10
  ) as duplicates;
  if twice is not null then
    raise unique_violation using
      message = 'rows that must be unique exist more than once: ' || twice,
      hint = 'Decide which row is right, rename or close the others, and run the migration again.';
  end if;
end
$$;

do $$
declare
  rule record;
begin
  -- A user is unique within a tenant, no longer in the whole database.
  if exists (select from pg_constraint where conrelid = 'users'::regclass and conname = 'users_email_key') then
    alter table users drop constraint users_email_key;
  end if;

  for rule in
    select wanted.* from (values
      ('tenants', 'tenants_slug_key', 'UNIQUE (slug)'),
      ('tenants', 'tenants_parent_tenant_id_fkey',
       'FOREIGN KEY (parent_tenant_id) REFERENCES tenants(id) ON DELETE SET NULL'),
      ('tenants', 'tenants_parent_check', 'CHECK (parent_tenant_id <> id)'),
      ('users', 'users_tenant_id_email_key', 'UNIQUE (tenant_id, email)'),
      ('api_keys', 'api_keys_user_id_fkey', 'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE'),
      ('jobs', 'jobs_user_id_fkey', 'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE'),
      ('executions', 'executions_job_id_fkey', 'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE'),
      ('matches', 'matches_execution_id_fkey',
       'FOREIGN KEY (execution_id) REFERENCES executions(id) ON DELETE CASCADE'),
      ('matches', 'matches_job_id_fkey', 'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE'),
      ('matches', 'matches_confidence_check', 'CHECK (confidence >= 0::numeric AND confidence <= 1::numeric)'),
      ('unmatched', 'unmatched_execution_id_fkey',
       'FOREIGN KEY (execution_id) REFERENCES executions(id) ON DELETE CASCADE'),
      ('unmatched', 'unmatched_job_id_fkey', 'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE'),
      ('reports', 'reports_execution_id_fkey',
       'FOREIGN KEY (execution_id) REFERENCES executions(id) ON DELETE CASCADE'),
      ('reports', 'reports_job_id_fkey', 'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE'),
      ('webhooks', 'webhooks_user_id_fkey', 'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE'),
      ('webhook_deliveries', 'webhook_deliveries_webhook_id_fkey',
       'FOREIGN KEY (webhook_id) REFERENCES webhooks(id) ON DELETE CASCADE'),
      ('audit_logs', 'audit_logs_user_id_fkey', 'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE SET NULL'),
      ('audit_logs', 'audit_logs_api_key_id_fkey',
       'FOREIGN KEY (api_key_id) REFERENCES api_keys(id) ON DELETE SET NULL'),
      ('audit_logs', 'audit_logs_tenant_id_fkey',
       'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE SET NULL'),
      ('idempotency_keys', 'idempotency_keys_user_id_fkey',
       'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE'),
      ('idempotency_keys', 'idempotency_keys_user_id_key_key', 'UNIQUE (user_id, key)'),
      ('security_events', 'security_events_user_id_fkey',
       'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE SET NULL'),
      ('security_events', 'security_events_api_key_id_fkey',
       'FOREIGN KEY (api_key_id) REFERENCES api_keys(id) ON DELETE SET NULL'),
      ('security_events', 'security_events_resolved_by_fkey',
       'FOREIGN KEY (resolved_by) REFERENCES users(id) ON DELETE SET NULL'),
      ('security_events', 'security_events_tenant_id_fkey',
       'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE SET NULL'),
      ('tenant_usage', 'tenant_usage_tenant_id_metric_type_period_start_key',
       'UNIQUE (tenant_id, metric_type, period_start)'),
      ('feature_flags', 'feature_flags_name_tenant_id_user_id_key', 'UNIQUE (name, tenant_id, user_id)'),
      ('feature_flags', 'feature_flags_user_id_fkey', 'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE'),
      ('feature_flags', 'feature_flags_rollout_percentage_check',
       'CHECK (rollout_percentage >= 0 AND rollout_percentage <= 100)'),
      ('feature_flag_changes', 'feature_flag_changes_feature_flag_id_fkey',
       'FOREIGN KEY (feature_flag_id) REFERENCES feature_flags(id) ON DELETE CASCADE'),
      ('feature_flag_changes', 'feature_flag_changes_changed_by_fkey',
       'FOREIGN KEY (changed_by) REFERENCES users(id) ON DELETE SET NULL'),
      ('event_store', 'event_store_event_id_key', 'UNIQUE (event_id)'),
      ('snapshots', 'snapshots_aggregate_id_aggregate_type_snapshot_version_key',
       'UNIQUE (aggregate_id, aggregate_type, snapshot_version)'),
      ('snapshots', 'snapshots_event_id_fkey',
       'FOREIGN KEY (event_id) REFERENCES event_store(event_id) ON DELETE CASCADE'),
      ('saga_state', 'saga_state_saga_id_saga_type_key', 'UNIQUE (saga_id, saga_type)'),
      ('dead_letter_queue', 'dead_letter_queue_event_id_fkey',
       'FOREIGN KEY (event_id) REFERENCES event_store(event_id) ON DELETE SET NULL')
    ) as wanted (relation, name, definition)
    union all
    select relation, relation || '_tenant_id_fkey', 'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE'
      from unnest(array[
        'users', 'api_keys', 'jobs', 'executions', 'matches', 'unmatched', 'reports', 'webhooks', 'webhook_payloads',
        'idempotency_keys', 'blocked_ips', 'tenant_usage', 'tenant_quota_usage', 'feature_flags', 'event_store',
        'snapshots', 'saga_state', 'dead_letter_queue', 'reconciliation_summary', 'tenant_usage_view',
        'error_hotspots_view'
      ]) as relation
  loop
    if exists (
      select from pg_constraint
        where conrelid = rule.relation::regclass and pg_get_constraintdef(oid, true) = rule.definition
    ) then
      continue;
    end if;
    begin
      execute format('alter table %I drop constraint if exists %I', rule.relation, rule.name);
      execute format('alter table %I add constraint %I %s', rule.relation, rule.name, rule.definition);
    exception when check_violation then
      -- An old row that breaks a CHECK must neither stop the migration nor become impossible to update.
      raise warning '% is left out: % has rows that break it', rule.name, rule.relation
        using hint = 'Correct the rows and run the migration again.';
    end;
  end loop;
end
$$;


-- 5. Indexes ----------------------------------------------------------------------------------------------------------
-- The policy adds «tenant_id = …» to every query of the API, so that its lists begin with tenant_id. Every foreign key
-- has an index that begins with it, for the deletes on the other side; those of sparse columns leave NULL out.

do $$
declare
  index record;
begin
  for index in
    select wanted.* from (values
      -- What UNIQUE constraints let through where a column is NULL.
      ('users_email_without_tenant_key', 'unique', 'users (email) where tenant_id is null'),
      ('feature_flags_name_scope_key', 'unique',
       $def$feature_flags (name, coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'),
                           coalesce(user_id, '00000000-0000-0000-0000-000000000000'))
            where tenant_id is null or user_id is null$def$),
      ('blocked_ips_active_key', 'unique',
       $def$blocked_ips (ip, coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'))
            where unblocked_at is null$def$),

      ('idx_tenants_parent', '', 'tenants (parent_tenant_id) where parent_tenant_id is not null'),
      ('idx_api_keys_tenant_prefix', '', 'api_keys (tenant_id, key_prefix)'),
      ('idx_api_keys_user_id', '', 'api_keys (user_id)'),
      ('idx_jobs_tenant_created_at', '', 'jobs (tenant_id, created_at desc)'),
      ('idx_jobs_user_id', '', 'jobs (user_id)'),
      ('idx_executions_tenant_started', '', 'executions (tenant_id, started_at desc)'),
      ('idx_executions_running_tenant_started', '',
       $def$executions (tenant_id, started_at desc) where status = 'running'$def$),
      ('idx_executions_job_started', '', 'executions (job_id, started_at desc)'),
      ('idx_matches_tenant_matched', '', 'matches (tenant_id, matched_at desc)'),
      ('idx_matches_job_confidence', '', 'matches (job_id, tenant_id, confidence desc)'),
      ('idx_matches_execution_id', '', 'matches (execution_id)'),
      ('idx_unmatched_tenant_created', '', 'unmatched (tenant_id, created_at desc)'),
      ('idx_unmatched_job_id', '', 'unmatched (job_id)'),
      ('idx_unmatched_execution_id', '', 'unmatched (execution_id)'),
      ('idx_reports_tenant_generated', '', 'reports (tenant_id, generated_at desc)'),
      ('idx_reports_job_generated', '', 'reports (job_id, generated_at desc)'),
      ('idx_reports_execution_id', '', 'reports (execution_id)'),
      ('idx_webhooks_tenant_id', '', 'webhooks (tenant_id)'),
      ('idx_webhooks_user_id', '', 'webhooks (user_id)'),
      ('idx_webhook_payloads_tenant_received', '', 'webhook_payloads (tenant_id, received_at desc)'),
      ('idx_webhook_payloads_unprocessed', '', 'webhook_payloads (tenant_id, received_at) where processed = false'),
      ('idx_webhook_deliveries_webhook_created', '', 'webhook_deliveries (webhook_id, created_at desc)'),
      ('idx_webhook_deliveries_retry', '', $def$webhook_deliveries (next_retry_at) where status = 'failed'$def$),
      ('idx_webhook_deliveries_webhook_retry', '',
       $def$webhook_deliveries (webhook_id, next_retry_at) where status = 'failed'$def$),
      ('idx_audit_logs_tenant_timestamp', '', 'audit_logs (tenant_id, "timestamp" desc)'),
      ('idx_audit_logs_user_timestamp', '', 'audit_logs (user_id, "timestamp")'),
      ('idx_audit_logs_api_key_id', '', 'audit_logs (api_key_id) where api_key_id is not null'),
      ('idx_idempotency_tenant_expires', '', 'idempotency_keys (tenant_id, expires_at)'),
      ('idx_idempotency_expires', '', 'idempotency_keys (expires_at)'),
      ('idx_revoked_tokens_expires_at', '', 'revoked_tokens (expires_at)'),
      ('idx_blocked_ips_tenant_id', '', 'blocked_ips (tenant_id)'),
      ('idx_security_events_tenant_created', '', 'security_events (tenant_id, created_at desc)'),
      ('idx_security_events_user_id', '', 'security_events (user_id) where user_id is not null'),
      ('idx_security_events_api_key_id', '', 'security_events (api_key_id) where api_key_id is not null'),
      ('idx_security_events_resolved_by', '', 'security_events (resolved_by) where resolved_by is not null'),
      ('idx_feature_flags_tenant_id', '', 'feature_flags (tenant_id)'),
      ('idx_feature_flags_user_id', '', 'feature_flags (user_id)'),
      ('idx_feature_flag_changes_flag_created', '', 'feature_flag_changes (feature_flag_id, created_at desc)'),
      ('idx_feature_flag_changes_changed_by', '', 'feature_flag_changes (changed_by) where changed_by is not null'),
      ('idx_event_store_tenant', '', 'event_store (tenant_id, created_at)'),
      ('idx_event_store_aggregate_replay', '', 'event_store (aggregate_id, aggregate_type, tenant_id, id)'),
      ('idx_snapshots_tenant', '', 'snapshots (tenant_id, aggregate_id, aggregate_type, snapshot_version desc)'),
      ('idx_snapshots_event_id', '', 'snapshots (event_id)'),
      ('idx_saga_state_tenant', '', 'saga_state (tenant_id, status)'),
      ('idx_dlq_tenant', '', 'dead_letter_queue (tenant_id, created_at)'),
      ('idx_dlq_unresolved_tenant', '', 'dead_letter_queue (tenant_id, created_at) where resolved_at is null'),
      ('idx_dlq_event_id', '', 'dead_letter_queue (event_id) where event_id is not null'),
      ('idx_reconciliation_summary_tenant_started', '', 'reconciliation_summary (tenant_id, started_at desc)'),
      ('idx_reconciliation_summary_job', '', 'reconciliation_summary (job_id)'),
      ('idx_error_hotspots_tenant_last', '', 'error_hotspots_view (tenant_id, last_occurred_at desc)'),
      ('idx_error_hotspots_job', '', 'error_hotspots_view (job_id)')
    ) as wanted (name, kind, definition)
    where not exists (select from pg_index where indexrelid = to_regclass('public.' || name) and indisvalid)
  loop
    execute format('drop index if exists %I', index.name); -- left invalid by a broken CREATE INDEX CONCURRENTLY
    execute format('create %s index %I on %s', index.kind, index.name, index.definition);
  end loop;

  -- Indexes of the old files that one above (or a constraint) serves as well: each only costs writes.
  for index in
    select name from unnest(array[
      'idx_tenants_slug', 'idx_users_email', 'idx_users_tenant_id', 'idx_users_tenant_email',
      'idx_api_keys_prefix', 'idx_api_keys_tenant_id', 'idx_api_keys_active_tenant',
      'idx_jobs_tenant_id', 'idx_jobs_list_covering', 'idx_jobs_cursor_pagination', 'idx_jobs_active_tenant_created',
      'idx_executions_job_id', 'idx_executions_tenant_id', 'idx_executions_list_covering',
      'idx_executions_cursor_pagination', 'idx_matches_job_id', 'idx_matches_job_status', 'idx_matches_tenant_id',
      'idx_matches_tenant_job_confidence', 'idx_matches_tenant_execution', 'idx_matches_cursor_pagination',
      'idx_unmatched_tenant_id', 'idx_unmatched_tenant_execution', 'idx_reports_job_id', 'idx_reports_tenant_id',
      'idx_reports_tenant_execution', 'idx_webhooks_active_tenant', 'idx_webhook_payloads_tenant_id',
      'idx_webhook_deliveries_webhook_id', 'idx_audit_logs_tenant_id', 'idx_audit_logs_user_id',
      'idx_idempotency_user_key', 'idx_idempotency_tenant_id', 'idx_blocked_ips_ip', 'idx_blocked_ips_active', 'idx_security_events_tenant_id',
      'idx_tenant_usage_tenant_id', 'idx_feature_flags_name', 'idx_feature_flag_changes_flag_id',
      'idx_event_store_aggregate', 'idx_snapshots_aggregate', 'idx_saga_state_saga_id', 'idx_dlq_unresolved',
      'idx_reconciliation_summary_tenant', 'idx_tenant_usage_tenant_date', 'idx_error_hotspots_tenant'
    ]) as name
    where to_regclass('public.' || name) is not null
  loop
    execute format('drop index %I', index.name);
  end loop;
end
$$;


-- 6. Functions --------------------------------------------------------------------------------------------------------
-- They run with the caller's rights and under the caller's policies, unless a comment says why not. All have a fixed
-- search_path and name their tables in full.

-- The tenant of this session, or NULL if app.current_tenant_id is unset, empty (as RESET leaves it) or no uuid: a
-- policy then finds no row, and no query fails. Policies call it as (select current_tenant_id()): once a query.
create or replace function current_tenant_id() returns uuid
language sql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
  select case when setting ~ '^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$' then setting::uuid end
    from current_setting('app.current_tenant_id', true) as setting
$$;

-- The tenant that a row with this parent has. A row may leave it open or say the same; anything else is refused, and so
-- is a parent that the session cannot see: a foreign key alone would find it in any tenant.
create or replace function inherit_tenant_id(
  p_table text, p_tenant_id uuid, p_parent text, p_parent_id uuid
) returns uuid
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  parent_tenant_id uuid;
begin
  if p_parent_id is null then
    return p_tenant_id; -- NOT NULL refuses the row, with a message of its own
  end if;
  case p_parent
    when 'users' then
      select u.tenant_id into parent_tenant_id from public.users as u where u.id = p_parent_id;
    when 'jobs' then
      select j.tenant_id into parent_tenant_id from public.jobs as j where j.id = p_parent_id;
    when 'executions' then
      select e.tenant_id into parent_tenant_id from public.executions as e where e.id = p_parent_id;
  end case;
  if not found then
    raise check_violation using
      message = format('%s refers to a row of %s that does not exist or belongs to another tenant: %s',
                       p_table, p_parent, p_parent_id);
  end if;
  if p_tenant_id is distinct from parent_tenant_id and p_tenant_id is not null then
    raise check_violation using
      message = format('%s has tenant_id %s, but its row of %s (%s) has tenant_id %s',
                       p_table, p_tenant_id, p_parent, p_parent_id, coalesce(parent_tenant_id::text, 'NULL')),
      hint = 'Leave tenant_id out: it is taken from the parent row.';
  end if;
  return parent_tenant_id;
end
$$;

create or replace function propagate_tenant_id_to_jobs() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('jobs', new.tenant_id, 'users', new.user_id);
  return new;
end
$$;

create or replace function propagate_tenant_id_to_api_keys() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('api_keys', new.tenant_id, 'users', new.user_id);
  return new;
end
$$;

create or replace function propagate_tenant_id_to_webhooks() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('webhooks', new.tenant_id, 'users', new.user_id);
  return new;
end
$$;

create or replace function propagate_tenant_id_to_idempotency_keys() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('idempotency_keys', new.tenant_id, 'users', new.user_id);
  return new;
end
$$;

create or replace function propagate_tenant_id_to_executions() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('executions', new.tenant_id, 'jobs', new.job_id);
  return new;
end
$$;

-- These three have two parents, which must agree.
create or replace function propagate_tenant_id_to_matches() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('matches', new.tenant_id, 'executions', new.execution_id);
  new.tenant_id := public.inherit_tenant_id('matches', new.tenant_id, 'jobs', new.job_id);
  return new;
end
$$;

create or replace function propagate_tenant_id_to_unmatched() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('unmatched', new.tenant_id, 'executions', new.execution_id);
  new.tenant_id := public.inherit_tenant_id('unmatched', new.tenant_id, 'jobs', new.job_id);
  return new;
end
$$;

create or replace function propagate_tenant_id_to_reports() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  new.tenant_id := public.inherit_tenant_id('reports', new.tenant_id, 'executions', new.execution_id);
  new.tenant_id := public.inherit_tenant_id('reports', new.tenant_id, 'jobs', new.job_id);
  return new;
end
$$;

-- Triggers look only where a parent or the tenant is named: other updates cost nothing. The text is PostgreSQL's own
-- form of the definition, so that an equal trigger is left alone and an older one replaced.
do $$
declare
  wanted record;
begin
  for wanted in
    select name, relation, format(
        'CREATE TRIGGER %s BEFORE INSERT OR UPDATE OF %s, tenant_id ON public.%s '
        'FOR EACH ROW EXECUTE FUNCTION propagate_tenant_id_to_%s()', name, links, relation, relation
      ) as definition
      from (values
        ('set_job_tenant_id', 'jobs', 'user_id'),
        ('set_api_key_tenant_id', 'api_keys', 'user_id'),
        ('set_webhook_tenant_id', 'webhooks', 'user_id'),
        ('set_idempotency_key_tenant_id', 'idempotency_keys', 'user_id'),
        ('set_execution_tenant_id', 'executions', 'job_id'),
        ('set_match_tenant_id', 'matches', 'execution_id, job_id'),
        ('set_unmatched_tenant_id', 'unmatched', 'execution_id, job_id'),
        ('set_report_tenant_id', 'reports', 'execution_id, job_id')
      ) as trigger (name, relation, links)
  loop
    if not exists (
      select from pg_trigger
        where tgrelid = wanted.relation::regclass and pg_get_triggerdef(oid) = wanted.definition
    ) then
      execute replace(wanted.definition, 'CREATE TRIGGER', 'CREATE OR REPLACE TRIGGER');
    end if;
  end loop;
end
$$;

-- Whether a tenant may use so much more of a quota (or, for rateLimitRpm, so many requests in this minute). False if
-- the tenant, the quota or its limit does not exist; never NULL.
create or replace function check_tenant_quota(
  p_tenant_id uuid, p_quota_type text, p_requested_value bigint default 1
) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  tenant record;
  usage record;
  month_start constant timestamp := date_trunc('month', now());
  used numeric;
begin
  select t.quotas ->> p_quota_type as quota, t.config into tenant
    from public.tenants as t where t.id = p_tenant_id and t.deleted_at is null;
  if not found or tenant.quota is null or tenant.quota !~ '^[0-9]{1,30}(\.[0-9]+)?$' then
    return false;
  end if;
  select u.* into usage from public.tenant_quota_usage as u where u.tenant_id = p_tenant_id;

  case p_quota_type
    when 'rateLimitRpm' then
      used := 0; -- the API counts requests itself
    when 'storageBytes' then
      used := usage.current_storage_bytes;
    when 'concurrentJobs' then
      used := usage.current_concurrent_jobs;
    when 'monthlyReconciliations' then
      select greatest(
          sum(u.metric_value),
          case when usage.last_reset_at >= month_start then usage.current_monthly_reconciliations end
        ) into used
        from public.tenant_usage as u
        where u.tenant_id = p_tenant_id and u.metric_type = 'reconciliation'
          and u.period_start >= month_start and u.period_start < month_start + interval '1 month';
    when 'customDomains' then
      used := case
        when jsonb_typeof(tenant.config -> 'customDomains') = 'array'
          then jsonb_array_length(tenant.config -> 'customDomains')
        when tenant.config ->> 'customDomain' <> '' then 1
      end;
    else
      return false;
  end case;
  return coalesce(used, 0) + coalesce(p_requested_value, 1) <= tenant.quota::numeric;
end
$$;

-- Adds to a counter (or takes from it, down to 0). The reconciliations of a month are counted in tenant_usage, where
-- the months stay; current_monthly_reconciliations shows the present month.
create or replace function increment_tenant_quota_usage(
  p_tenant_id uuid, p_quota_type text, p_value bigint default 1
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  month_start constant timestamp := date_trunc('month', now());
  storage constant bigint := case p_quota_type when 'storageBytes' then p_value else 0 end;
  jobs constant bigint := case p_quota_type when 'concurrentJobs' then p_value else 0 end;
  reconciliations bigint;
begin
  if p_quota_type in ('monthlyReconciliations', 'reconciliation') then
    insert into public.tenant_usage as u (tenant_id, metric_type, metric_value, period_start, period_end)
      values (p_tenant_id, 'reconciliation', greatest(p_value, 0), month_start, month_start + interval '1 month')
      on conflict (tenant_id, metric_type, period_start)
        do update set metric_value = greatest(u.metric_value + p_value, 0)
      returning u.metric_value into reconciliations;
  elsif p_quota_type is null or p_quota_type not in ('storageBytes', 'concurrentJobs') then
    raise invalid_parameter_value using
      message = format('%L is no quota that is counted here', p_quota_type),
      hint = 'Known: storageBytes, concurrentJobs, monthlyReconciliations.';
  end if;

  insert into public.tenant_quota_usage as u
      (tenant_id, current_storage_bytes, current_concurrent_jobs, current_monthly_reconciliations)
    values (p_tenant_id, greatest(storage, 0), greatest(jobs, 0), coalesce(reconciliations, 0))
    on conflict (tenant_id) do update set
      current_storage_bytes = greatest(coalesce(u.current_storage_bytes, 0) + storage, 0),
      current_concurrent_jobs = greatest(coalesce(u.current_concurrent_jobs, 0) + jobs, 0),
      current_monthly_reconciliations = coalesce(
        reconciliations, case when u.last_reset_at >= month_start then u.current_monthly_reconciliations else 0 end
      ),
      last_reset_at = case when u.last_reset_at >= month_start then u.last_reset_at else now() end,
      updated_at = now();
end
$$;

create or replace function get_latest_snapshot(p_aggregate_id uuid, p_aggregate_type varchar)
returns table (snapshot_data jsonb, snapshot_version integer, event_id uuid)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select s.snapshot_data, s.snapshot_version, s.event_id
    from public.snapshots as s
    where s.aggregate_id = p_aggregate_id and s.aggregate_type = p_aggregate_type
    order by s.snapshot_version desc
    limit 1
$$;

-- The events that are not in that snapshot yet; all of them if there is no such snapshot.
create or replace function get_events_after_snapshot(
  p_aggregate_id uuid, p_aggregate_type varchar, p_snapshot_version integer
)
returns table (
  event_id uuid, event_type varchar, event_version integer, data jsonb, metadata jsonb, created_at timestamp
)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select e.event_id, e.event_type, e.event_version, e.data, e.metadata, e.created_at
    from public.event_store as e
    where e.aggregate_id = p_aggregate_id and e.aggregate_type = p_aggregate_type
      and e.id > coalesce((
        select last.id
          from public.snapshots as s join public.event_store as last on last.event_id = s.event_id
          where s.aggregate_id = p_aggregate_id and s.aggregate_type = p_aggregate_type
            and s.snapshot_version = p_snapshot_version
      ), 0)
    order by e.id
$$;

create or replace function get_all_events_for_aggregate(p_aggregate_id uuid, p_aggregate_type varchar)
returns table (
  event_id uuid, event_type varchar, event_version integer, data jsonb, metadata jsonb, created_at timestamp
)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select e.event_id, e.event_type, e.event_version, e.data, e.metadata, e.created_at
    from public.event_store as e
    where e.aggregate_id = p_aggregate_id and e.aggregate_type = p_aggregate_type
    order by e.id
$$;

-- What the API must do before it knows a tenant, or with tables that no tenant session may touch. These functions are
-- SECURITY DEFINER: they see past the policies. EXECUTE stays with PUBLIC, because the API's role has another name in
-- every environment; instead each asks for the right on the table that the plain statement would ask for. A role
-- without rights on the tables gains nothing from them. (session_user, because current_user is the owner here.)

create schema if not exists private;

create or replace function private.require_privilege(p_table text, p_privilege text) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if not has_table_privilege(session_user, p_table, p_privilege)
    and not pg_has_role(session_user, current_user, 'member') -- the migrator may become the owner
  then
    raise insufficient_privilege using
      message = format('role %s has no %s right on %s', session_user, p_privilege, p_table);
  end if;
end
$$;

-- Asked for every request, most of them before the login: blocks for everyone must count without a tenant, too.
create or replace function is_ip_blocked(p_ip varchar, p_tenant_id uuid default null) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.require_privilege('public.blocked_ips', 'select');
  return exists (
    select from public.blocked_ips as b
      where b.ip = p_ip and b.unblocked_at is null and (b.tenant_id is null or b.tenant_id = p_tenant_id)
  );
end
$$;

create or replace function is_token_revoked(p_jti varchar) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.require_privilege('public.revoked_tokens', 'select');
  return exists (select from public.revoked_tokens as r where r.jti = p_jti);
end
$$;

-- Revoking twice keeps the first reason and the later expiry.
create or replace function revoke_token(p_jti varchar, p_expires_at timestamp, p_reason text default null) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.require_privilege('public.revoked_tokens', 'insert');
  insert into public.revoked_tokens as r (jti, reason, expires_at)
    values (p_jti, p_reason, p_expires_at)
    on conflict (jti) do update set expires_at = excluded.expires_at
      where r.expires_at < excluded.expires_at;
end
$$;

create or replace function cleanup_expired_revoked_tokens() returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.require_privilege('public.revoked_tokens', 'delete');
  delete from public.revoked_tokens as r where r.expires_at < now();
end
$$;

-- How to verify the signature of what an adapter sends.
create or replace function get_webhook_config(p_adapter varchar)
returns table (secret varchar, signature_algorithm varchar)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.require_privilege('public.webhook_configs', 'select');
  return query
    select c.secret, c.signature_algorithm from public.webhook_configs as c where c.adapter = p_adapter;
end
$$;


-- 7. Row level security -----------------------------------------------------------------------------------------------
-- On all 28 tables, for every role but the owner, who must see all rows for backups and migrations (no FORCE).
-- A policy's comment is its rule in words; a policy without exactly that comment is replaced.

do $$
declare
  relation regclass;
begin
  for relation in
    select name::regclass
      from unnest(array[
        'tenants', 'users', 'api_keys', 'jobs', 'executions', 'matches', 'unmatched', 'reports',
        'webhooks', 'webhook_payloads', 'webhook_deliveries', 'webhook_configs', 'audit_logs', 'idempotency_keys',
        'revoked_tokens', 'blocked_ips', 'security_events', 'tenant_usage', 'tenant_quota_usage',
        'feature_flags', 'feature_flag_changes', 'event_store', 'snapshots', 'saga_state', 'dead_letter_queue',
        'reconciliation_summary', 'tenant_usage_view', 'error_hotspots_view'
      ]) as name
      where not (select relrowsecurity from pg_class where oid = name::regclass)
  loop
    execute format('alter table %s enable row level security', relation);
  end loop;
end
$$;

do $$
declare
  wanted record;
begin
  for wanted in
    with own (condition) as (values ('tenant_id = (select current_tenant_id())'))
    select 'tenant_isolation_' || relation as name, relation, 'all' as command,
        condition as readable, condition as writable, 'A tenant''s own rows.' as rule
      from own, unnest(array[
        'users', 'jobs', 'executions', 'matches', 'unmatched', 'reports', 'webhooks', 'api_keys', 'webhook_payloads',
        'idempotency_keys', 'tenant_usage', 'tenant_quota_usage', 'event_store', 'saga_state',
        'reconciliation_summary', 'tenant_usage_view', 'error_hotspots_view', 'blocked_ips'
      ]) as relation

    -- References that no trigger guards: the subqueries run under the policies, so they find rows of the tenant only.
    union all
    select 'tenant_isolation_' || coalesce(short, relation), relation, 'all', condition,
        condition || ' and ' || reference, 'A tenant''s own rows, which refer to its own rows only.'
      from own, (values
        ('audit_logs', null,
         '(user_id is null or exists (select from users where users.id = audit_logs.user_id))
          and (api_key_id is null or exists (select from api_keys where api_keys.id = audit_logs.api_key_id))'),
        ('security_events', null,
         '(user_id is null or exists (select from users where users.id = security_events.user_id))
          and (api_key_id is null or exists (select from api_keys where api_keys.id = security_events.api_key_id))
          and (resolved_by is null or exists (select from users where users.id = security_events.resolved_by))'),
        ('feature_flags', null,
         '(user_id is null or exists (select from users where users.id = feature_flags.user_id))'),
        ('snapshots', null,
         'exists (select from event_store where event_store.event_id = snapshots.event_id)'),
        ('dead_letter_queue', 'dlq',
         '(event_id is null
           or exists (select from event_store where event_store.event_id = dead_letter_queue.event_id))')
      ) as referring (relation, short, reference)

    union all
    select * from (values
      ('tenant_isolation_tenants', 'tenants', 'all',
       'id = (select current_tenant_id())', 'id = (select current_tenant_id())', 'A tenant''s own row.'),
      -- An array is asked for once and then looked up in an index; exists() would be asked of every tenant's deliveries.
      ('tenant_isolation_webhook_deliveries', 'webhook_deliveries', 'all',
       'webhook_id = any (array(
          select webhooks.id from webhooks where webhooks.tenant_id = (select current_tenant_id())))',
       'exists (select from webhooks where webhooks.id = webhook_deliveries.webhook_id
                  and webhooks.tenant_id = (select current_tenant_id()))',
       'The deliveries of a tenant''s own webhooks.'),
      ('tenant_isolation_feature_flag_changes', 'feature_flag_changes', 'all',
       'exists (select from feature_flags where feature_flags.id = feature_flag_changes.feature_flag_id
                  and feature_flags.tenant_id = (select current_tenant_id()))',
       'exists (select from feature_flags where feature_flags.id = feature_flag_changes.feature_flag_id
                  and feature_flags.tenant_id = (select current_tenant_id()))
        and (changed_by is null or exists (select from users where users.id = feature_flag_changes.changed_by))',
       'The history of a tenant''s own flags; that of flags for everyone is the operator''s.'),
      ('global_rows_feature_flags', 'feature_flags', 'select',
       'tenant_id is null and (select current_tenant_id()) is not null', null,
       'Flags for everyone: every tenant reads them, none writes them.'),
      ('global_rows_blocked_ips', 'blocked_ips', 'select',
       'tenant_id is null and (select current_tenant_id()) is not null', null,
       'Blocks for everyone: every tenant reads them, none writes them.'),
      ('global_rows_security_events', 'security_events', 'insert',
       null, 'tenant_id is null',
       'Events before a tenant is known: every session reports them, none reads them.')
    ) as other
  loop
    if not exists (
      select from pg_policy
        where polrelid = wanted.relation::regclass and polname = wanted.name
          and obj_description(oid, 'pg_policy') = wanted.rule
    ) then
      execute format('drop policy if exists %I on %I', wanted.name, wanted.relation);
      execute concat_ws(' ',
        format('create policy %I on %I for %s', wanted.name, wanted.relation, wanted.command),
        'using (' || wanted.readable || ')', 'with check (' || wanted.writable || ')'
      );
      execute format('comment on policy %I on %I is %L', wanted.name, wanted.relation, wanted.rule);
    end if;
  end loop;
end
$$;

comment on table webhook_configs is
  'No policy: a tenant session has no access, only get_webhook_config().';
comment on table revoked_tokens is
  'No policy: a tenant session has no access, only is_token_revoked(), revoke_token() and '
  'cleanup_expired_revoked_tokens().';


-- 8. Statistics -------------------------------------------------------------------------------------------------------
-- Materialized views know no policies. They live in the schema private, on which the API's role has no right, and are
-- read through views in public that show a tenant its own rows; security_barrier keeps a caller's functions from seeing
-- others. Each has a UNIQUE index and is filled at once: REFRESH … CONCURRENTLY needs both.

-- The old ones in public were readable by every tenant.
drop materialized view if exists
  public.mv_reconciliation_summary_daily, public.mv_job_performance,
  public.mv_tenant_usage_hourly, public.mv_match_accuracy_by_job;

create materialized view if not exists private.mv_reconciliation_summary_daily as
  select e.tenant_id, e.started_at::date as day, count(*) as executions,
      coalesce(sum(m.matched), 0)::bigint as matched, coalesce(sum(u.unmatched), 0)::bigint as unmatched,
      round(avg(e.duration_ms)) as average_duration_ms
    from public.executions as e
      left join (select execution_id, count(*) as matched from public.matches group by execution_id) as m
        on m.execution_id = e.id
      left join (select execution_id, count(*) as unmatched from public.unmatched group by execution_id) as u
        on u.execution_id = e.id
    where e.tenant_id is not null and e.started_at is not null
    group by e.tenant_id, e.started_at::date;
create unique index if not exists mv_reconciliation_summary_daily_key
  on private.mv_reconciliation_summary_daily (tenant_id, day);

create materialized view if not exists private.mv_job_performance as
  select j.tenant_id, j.id as job_id, count(e.id) as runs,
      count(*) filter (where e.status = 'completed') as completed,
      count(*) filter (where e.status = 'failed') as failed,
      round(
        count(*) filter (where e.status = 'completed')::numeric
          / nullif(count(*) filter (where e.status::text in ('completed', 'failed')), 0), 4
      ) as success_rate,
      round(avg(e.duration_ms)) as average_duration_ms, max(e.duration_ms) as longest_duration_ms
    from public.jobs as j left join public.executions as e on e.job_id = j.id
    where j.tenant_id is not null
    group by j.tenant_id, j.id;
create unique index if not exists mv_job_performance_key
  on private.mv_job_performance (tenant_id, job_id);

create materialized view if not exists private.mv_tenant_usage_hourly as
  select tenant_id, hour, sum(executions)::bigint as executions, sum(matches)::bigint as matches
    from (
      select tenant_id, date_trunc('hour', started_at) as hour, count(*) as executions, 0 as matches
        from public.executions group by 1, 2
      union all
      select tenant_id, date_trunc('hour', matched_at), 0, count(*)
        from public.matches group by 1, 2
    ) as counted
    where tenant_id is not null and hour is not null
    group by tenant_id, hour;
create unique index if not exists mv_tenant_usage_hourly_key
  on private.mv_tenant_usage_hourly (tenant_id, hour);

create materialized view if not exists private.mv_match_accuracy_by_job as
  select tenant_id, job_id, count(*) as matches, round(avg(confidence), 4) as average_confidence
    from public.matches
    where tenant_id is not null
    group by tenant_id, job_id;
create unique index if not exists mv_match_accuracy_by_job_key
  on private.mv_match_accuracy_by_job (tenant_id, job_id);

create or replace view reconciliation_summary_daily with (security_barrier = true) as
  select tenant_id, day, executions, matched, unmatched, average_duration_ms
    from private.mv_reconciliation_summary_daily
    where tenant_id = (select current_tenant_id());

create or replace view job_performance with (security_barrier = true) as
  select tenant_id, job_id, runs, completed, failed, success_rate, average_duration_ms, longest_duration_ms
    from private.mv_job_performance
    where tenant_id = (select current_tenant_id());

create or replace view tenant_usage_hourly with (security_barrier = true) as
  select tenant_id, hour, executions, matches
    from private.mv_tenant_usage_hourly
    where tenant_id = (select current_tenant_id());

create or replace view match_accuracy_by_job with (security_barrier = true) as
  select tenant_id, job_id, matches, average_confidence
    from private.mv_match_accuracy_by_job
    where tenant_id = (select current_tenant_id());

-- For the owner, from a scheduler. Readers go on reading while it runs, but for a view that is not filled.
create or replace function refresh_all_materialized_views() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  view record;
begin
  for view in
    select matviewname as name, ispopulated as populated
      from pg_matviews where schemaname = 'private' order by matviewname
  loop
    execute format('refresh materialized view %s private.%I',
                   case when view.populated then 'concurrently' else '' end, view.name);
  end loop;
end
$$;
