-- Projections: tables, whatever their names say. tenant_usage_view is open to every tenant.

create table reconciliation_summary (
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
  tenant_id uuid references tenants (id) on delete cascade,
  updated_at timestamp not null default now()
);
create index idx_reconciliation_summary_tenant on reconciliation_summary (tenant_id);
create index idx_reconciliation_summary_job on reconciliation_summary (job_id);

create table tenant_usage_view (
  tenant_id uuid not null references tenants (id) on delete cascade,
  date date not null,
  reconciliation_count integer default 0,
  total_duration_ms bigint default 0,
  success_count integer default 0,
  failure_count integer default 0,
  primary key (tenant_id, date)
);
create index idx_tenant_usage_tenant_date on tenant_usage_view (tenant_id, date desc);

create table error_hotspots_view (
  reconciliation_id uuid not null,
  job_id uuid not null,
  error_type varchar(100) not null,
  error_count integer default 1,
  step varchar(100),
  first_occurred_at timestamp not null default now(),
  last_occurred_at timestamp not null default now(),
  tenant_id uuid references tenants (id) on delete cascade,
  primary key (reconciliation_id, error_type, step)
);
create index idx_error_hotspots_tenant on error_hotspots_view (tenant_id);

alter table reconciliation_summary enable row level security;
alter table error_hotspots_view enable row level security;
create policy tenant_isolation_reconciliation_summary on reconciliation_summary using (tenant_id = current_tenant_id());
create policy tenant_isolation_error_hotspots_view on error_hotspots_view using (tenant_id = current_tenant_id());
