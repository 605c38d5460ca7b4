-- Event sourcing. dead_letter_queue has no policy; get_events_after_snapshot() fails at its first call (event_id).

create table event_store (
  id bigserial primary key,
  event_id uuid not null unique,
  aggregate_id uuid not null,
  aggregate_type varchar(100) not null,
  event_type varchar(100) not null,
  event_version integer not null default 1,
  data jsonb not null,
  metadata jsonb not null default '{}',
  tenant_id uuid references tenants (id) on delete cascade,
  created_at timestamp not null default now()
);
create index idx_event_store_aggregate on event_store (aggregate_id, aggregate_type, created_at);
create index idx_event_store_tenant on event_store (tenant_id, created_at);

create table snapshots (
  id bigserial primary key,
  aggregate_id uuid not null,
  aggregate_type varchar(100) not null,
  snapshot_data jsonb not null,
  snapshot_version integer not null,
  event_id uuid not null references event_store (event_id) on delete cascade,
  tenant_id uuid references tenants (id) on delete cascade,
  created_at timestamp not null default now(),
  unique (aggregate_id, aggregate_type, snapshot_version)
);
create index idx_snapshots_aggregate on snapshots (aggregate_id, aggregate_type, snapshot_version desc);

create table saga_state (
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
  tenant_id uuid references tenants (id) on delete cascade,
  correlation_id uuid,
  created_at timestamp not null default now(),
  updated_at timestamp not null default now(),
  completed_at timestamp,
  unique (saga_id, saga_type)
);
create index idx_saga_state_saga_id on saga_state (saga_id, saga_type);

create table dead_letter_queue (
  id uuid primary key default gen_random_uuid(),
  saga_id varchar(255),
  event_id uuid references event_store (event_id) on delete set null,
  error_type varchar(100) not null,
  error_message text not null,
  error_stack text,
  payload jsonb not null,
  retry_count integer default 0,
  max_retries integer default 3,
  tenant_id uuid references tenants (id) on delete cascade,
  correlation_id uuid,
  created_at timestamp not null default now(),
  resolved_at timestamp,
  resolution_notes text
);
create index idx_dlq_unresolved on dead_letter_queue (resolved_at) where resolved_at is null;

alter table event_store enable row level security;
alter table snapshots enable row level security;
alter table saga_state enable row level security;
create policy tenant_isolation_event_store on event_store using (tenant_id = current_tenant_id());
create policy tenant_isolation_snapshots on snapshots using (tenant_id = current_tenant_id());
create policy tenant_isolation_saga_state on saga_state using (tenant_id = current_tenant_id());

create function get_events_after_snapshot(p_aggregate_id uuid, p_aggregate_type varchar, p_snapshot_version integer)
returns table (
  event_id uuid, event_type varchar, event_version integer, data jsonb, metadata jsonb, created_at timestamp
) language plpgsql stable as $$
begin
  return query
    select e.event_id, e.event_type, e.event_version, e.data, e.metadata, e.created_at from event_store e
      where e.aggregate_id = p_aggregate_id and e.aggregate_type = p_aggregate_type
        and e.id > (select id from event_store where event_id = (
          select event_id from snapshots
            where aggregate_id = p_aggregate_id and snapshot_version = p_snapshot_version));
end $$;
