-- Tenants: columns are added at the end, nobody fills them for the rows that exist. users.email stays unique.

create table tenants (
  id uuid primary key default gen_random_uuid(),
  name varchar(255) not null,
  slug varchar(255) unique not null,
  parent_tenant_id uuid references tenants (id) on delete set null,
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
create index idx_tenants_slug on tenants (slug);

alter table users add column tenant_id uuid references tenants (id) on delete cascade;
alter table jobs add column tenant_id uuid references tenants (id) on delete cascade;
alter table executions add column tenant_id uuid references tenants (id) on delete cascade;
alter table matches add column tenant_id uuid references tenants (id) on delete cascade;
alter table unmatched add column tenant_id uuid references tenants (id) on delete cascade;
alter table reports add column tenant_id uuid references tenants (id) on delete cascade;
alter table webhooks add column tenant_id uuid references tenants (id) on delete cascade;
alter table api_keys add column tenant_id uuid references tenants (id) on delete cascade;
alter table webhook_payloads add column tenant_id uuid references tenants (id) on delete cascade;
alter table audit_logs add column tenant_id uuid references tenants (id) on delete set null;
alter table idempotency_keys add column tenant_id uuid references tenants (id) on delete cascade;

create index idx_users_tenant_id on users (tenant_id);
create index idx_users_tenant_email on users (tenant_id, email);
create index idx_jobs_tenant_id on jobs (tenant_id);
create index idx_executions_tenant_id on executions (tenant_id);
create index idx_matches_tenant_id on matches (tenant_id);
create index idx_unmatched_tenant_id on unmatched (tenant_id);
create index idx_reports_tenant_id on reports (tenant_id);
create index idx_webhooks_tenant_id on webhooks (tenant_id);
create index idx_api_keys_tenant_id on api_keys (tenant_id);
create index idx_webhook_payloads_tenant_id on webhook_payloads (tenant_id);
create index idx_audit_logs_tenant_id on audit_logs (tenant_id);
create index idx_idempotency_tenant_id on idempotency_keys (tenant_id);

create table tenant_usage (
  id uuid primary key default gen_random_uuid(),
  tenant_id uuid not null references tenants (id) on delete cascade,
  metric_type varchar(50) not null,
  metric_value bigint not null default 0,
  period_start timestamp not null,
  period_end timestamp not null,
  created_at timestamp default now(),
  unique (tenant_id, metric_type, period_start)
);
create index idx_tenant_usage_tenant_id on tenant_usage (tenant_id);

create table tenant_quota_usage (
  tenant_id uuid primary key references tenants (id) on delete cascade,
  current_storage_bytes bigint default 0,
  current_concurrent_jobs integer default 0,
  current_monthly_reconciliations integer default 0,
  last_reset_at timestamp default now(),
  updated_at timestamp default now()
);

create table feature_flags (
  id uuid primary key default gen_random_uuid(),
  name varchar(255) not null,
  description text,
  enabled boolean default false,
  rollout_percentage integer default 0,
  tenant_id uuid references tenants (id) on delete cascade,
  user_id uuid references users (id) on delete cascade,
  conditions jsonb default '{}',
  created_at timestamp default now(),
  updated_at timestamp default now(),
  deleted_at timestamp,
  unique (name, tenant_id, user_id)
);
create index idx_feature_flags_name on feature_flags (name);

create table feature_flag_changes (
  id uuid primary key default gen_random_uuid(),
  feature_flag_id uuid not null references feature_flags (id) on delete cascade,
  changed_by uuid references users (id) on delete set null,
  old_value jsonb,
  new_value jsonb,
  reason text,
  created_at timestamp default now()
);
create index idx_feature_flag_changes_flag_id on feature_flag_changes (feature_flag_id);

-- Fails for a session without a tenant: ''::uuid.
create function current_tenant_id() returns uuid language sql stable
as $$ select current_setting('app.current_tenant_id', true)::uuid $$;

alter table users enable row level security;
alter table jobs enable row level security;
alter table executions enable row level security;
alter table matches enable row level security;
alter table unmatched enable row level security;
alter table reports enable row level security;
alter table webhooks enable row level security;
alter table api_keys enable row level security;
alter table webhook_payloads enable row level security;
alter table audit_logs enable row level security;
alter table idempotency_keys enable row level security;
alter table tenant_usage enable row level security;
alter table tenant_quota_usage enable row level security;

-- idempotency_keys has none: the run of that day stopped before it, and psql said nothing.
create policy tenant_isolation_users on users using (tenant_id = current_tenant_id());
create policy tenant_isolation_jobs on jobs using (tenant_id = current_tenant_id());
create policy tenant_isolation_executions on executions using (tenant_id = current_tenant_id());
create policy tenant_isolation_matches on matches using (tenant_id = current_tenant_id());
create policy tenant_isolation_unmatched on unmatched using (tenant_id = current_tenant_id());
create policy tenant_isolation_reports on reports using (tenant_id = current_tenant_id());
create policy tenant_isolation_webhooks on webhooks using (tenant_id = current_tenant_id());
create policy tenant_isolation_api_keys on api_keys using (tenant_id = current_tenant_id());
create policy tenant_isolation_webhook_payloads on webhook_payloads using (tenant_id = current_tenant_id());
create policy tenant_isolation_audit_logs on audit_logs using (tenant_id = current_tenant_id());
create policy tenant_isolation_tenant_usage on tenant_usage using (tenant_id = current_tenant_id());
create policy tenant_isolation_tenant_quota_usage on tenant_quota_usage using (tenant_id = current_tenant_id());

-- Fills a missing tenant_id and believes any other.
create function propagate_tenant_id_to_jobs() returns trigger language plpgsql as $$
begin
  if new.tenant_id is null then
    new.tenant_id = (select tenant_id from users where id = new.user_id);
  end if;
  return new;
end $$;
create trigger set_job_tenant_id before insert or update on jobs
  for each row execute function propagate_tenant_id_to_jobs();

create function propagate_tenant_id_to_executions() returns trigger language plpgsql as $$
begin
  if new.tenant_id is null then
    new.tenant_id = (select tenant_id from jobs where id = new.job_id);
  end if;
  return new;
end $$;
create trigger set_execution_tenant_id before insert or update on executions
  for each row execute function propagate_tenant_id_to_executions();

create function propagate_tenant_id_to_matches() returns trigger language plpgsql as $$
begin
  if new.tenant_id is null then
    new.tenant_id = (select tenant_id from jobs where id = new.job_id);
  end if;
  return new;
end $$;
create trigger set_match_tenant_id before insert or update on matches
  for each row execute function propagate_tenant_id_to_matches();

-- Counts the first increment as 0, and no month at all; NULL where there is no usage row.
create function increment_tenant_quota_usage(p_tenant_id uuid, p_quota_type text, p_value bigint default 1)
returns void language plpgsql as $$
begin
  insert into tenant_quota_usage (tenant_id) values (p_tenant_id)
    on conflict (tenant_id) do update set
      current_storage_bytes = tenant_quota_usage.current_storage_bytes
        + case p_quota_type when 'storageBytes' then p_value else 0 end,
      current_concurrent_jobs = tenant_quota_usage.current_concurrent_jobs
        + case p_quota_type when 'concurrentJobs' then p_value else 0 end;
end $$;

create function check_tenant_quota(p_tenant_id uuid, p_quota_type text, p_requested_value bigint default 1)
returns boolean language plpgsql stable security definer as $$
begin
  return (
    select q.current_concurrent_jobs + p_requested_value <= (t.quotas ->> p_quota_type)::bigint
      from tenants t join tenant_quota_usage q on q.tenant_id = t.id where t.id = p_tenant_id
  );
end $$;
