-- runbook: no-transaction
-- runbook: changes=tenants,users.tenant_id,api_keys.tenant_id,jobs.tenant_id,executions.tenant_id,matches.tenant_id
-- runbook: changes=unmatched.tenant_id,reports.tenant_id,webhooks.tenant_id,idempotency_keys.tenant_id
-- runbook: changes=webhook_payloads.tenant_id,audit_logs.tenant_id,event_store.tenant_id,snapshots.tenant_id
-- runbook: changes=saga_state.tenant_id,dead_letter_queue.tenant_id,reconciliation_summary.tenant_id
-- runbook: changes=error_hotspots_view.tenant_id

-- The Settler schema, 2 of 5: a tenant for the rows of an old database.
--
-- A row takes the tenant of the row that it belongs to. Rows that belong to none go to the tenant with slug «default»,
-- which is made only if such a row exists. NULL stays in feature_flags, blocked_ips and security_events: there it means
-- «everyone». Each statement is a transaction of its own and locks no row but those that it changes.
--
-- None of this touches a database that has gone on to 003 before, as the index of the last condition shows: a NULL in
-- audit_logs is then a deleted tenant's, and must not be given to another one.

insert into public.tenants (id, name, slug)
  select '00000000-0000-4000-8000-000000000001', 'Default Tenant', 'default'
  where not exists (select from public.tenants where slug = 'default') and to_regclass('public.users_id_tenant_id_key') is null
    and exists (select from public.users where tenant_id is null);

update public.users set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.api_keys as child set tenant_id = parent.tenant_id from public.users as parent
  where child.tenant_id is null and parent.id = child.user_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.jobs as child set tenant_id = parent.tenant_id from public.users as parent
  where child.tenant_id is null and parent.id = child.user_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.executions as child set tenant_id = parent.tenant_id from public.jobs as parent
  where child.tenant_id is null and parent.id = child.job_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.matches as child set tenant_id = parent.tenant_id from public.executions as parent
  where child.tenant_id is null and parent.id = child.execution_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.unmatched as child set tenant_id = parent.tenant_id from public.executions as parent
  where child.tenant_id is null and parent.id = child.execution_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.reports as child set tenant_id = parent.tenant_id from public.executions as parent
  where child.tenant_id is null and parent.id = child.execution_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.webhooks as child set tenant_id = parent.tenant_id from public.users as parent
  where child.tenant_id is null and parent.id = child.user_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.idempotency_keys as child set tenant_id = parent.tenant_id from public.users as parent
  where child.tenant_id is null and parent.id = child.user_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.audit_logs as child set tenant_id = parent.tenant_id from public.users as parent
  where child.tenant_id is null and parent.id = child.user_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.audit_logs as child set tenant_id = parent.tenant_id from public.api_keys as parent
  where child.tenant_id is null and parent.id = child.api_key_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.event_store as child set tenant_id = parent.tenant_id from public.jobs as parent
  where child.tenant_id is null and parent.id = child.aggregate_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.event_store as child set tenant_id = parent.tenant_id from public.executions as parent
  where child.tenant_id is null and parent.id = child.aggregate_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.saga_state as child set tenant_id = parent.tenant_id from public.jobs as parent
  where child.tenant_id is null and parent.id = child.aggregate_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.saga_state as child set tenant_id = parent.tenant_id from public.executions as parent
  where child.tenant_id is null and parent.id = child.aggregate_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.reconciliation_summary as child set tenant_id = parent.tenant_id from public.jobs as parent
  where child.tenant_id is null and parent.id = child.job_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

insert into public.tenants (id, name, slug)
  select '00000000-0000-4000-8000-000000000001', 'Default Tenant', 'default'
  where not exists (select from public.tenants where slug = 'default') and to_regclass('public.users_id_tenant_id_key') is null
    and (
      exists (select from public.webhook_payloads where tenant_id is null)
      or exists (select from public.audit_logs where tenant_id is null)
      or exists (select from public.event_store where tenant_id is null)
      or exists (select from public.saga_state where tenant_id is null)
      or exists (select from public.reconciliation_summary where tenant_id is null)
    );

update public.webhook_payloads set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.audit_logs set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.event_store set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.saga_state set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.reconciliation_summary set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.snapshots as child set tenant_id = parent.tenant_id from public.event_store as parent
  where child.tenant_id is null and parent.event_id = child.event_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.dead_letter_queue as child set tenant_id = parent.tenant_id from public.event_store as parent
  where child.tenant_id is null and parent.event_id = child.event_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.error_hotspots_view as child set tenant_id = parent.tenant_id from public.reconciliation_summary as parent
  where child.tenant_id is null and parent.reconciliation_id = child.reconciliation_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

update public.error_hotspots_view as child set tenant_id = parent.tenant_id from public.jobs as parent
  where child.tenant_id is null and parent.id = child.job_id and parent.tenant_id is not null
    and to_regclass('public.users_id_tenant_id_key') is null;

insert into public.tenants (id, name, slug)
  select '00000000-0000-4000-8000-000000000001', 'Default Tenant', 'default'
  where not exists (select from public.tenants where slug = 'default') and to_regclass('public.users_id_tenant_id_key') is null
    and (
      exists (select from public.dead_letter_queue where tenant_id is null)
      or exists (select from public.error_hotspots_view where tenant_id is null)
    );

update public.dead_letter_queue set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;

update public.error_hotspots_view set tenant_id = (select id from public.tenants where slug = 'default')
  where tenant_id is null and to_regclass('public.users_id_tenant_id_key') is null;
