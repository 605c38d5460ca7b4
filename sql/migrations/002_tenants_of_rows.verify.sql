-- What the rules of 003 and 004 would stop at is named before hours go into indexes. Each row is for a person to sort out:
-- no row is dropped or changed here.

-- Rows that must be unique, and that rules without an answer to NULL have let in twice.
select 'users' as relation, email as name, coalesce(tenant_id::text, 'none') as tenant, count(*) as times
  from public.users group by tenant_id, email having count(*) > 1;

select 'feature_flags' as relation, name, coalesce(tenant_id::text, 'all') as tenant,
    coalesce(user_id::text, 'all') as of_user, count(*) as times
  from public.feature_flags group by name, tenant_id, user_id having count(*) > 1;

select 'blocked_ips' as relation, ip as name, coalesce(tenant_id::text, 'all') as tenant, count(*) as times
  from public.blocked_ips where unblocked_at is null group by ip, tenant_id having count(*) > 1;

-- Rows that refer to one of another tenant.
select 'api_keys' as relation, child.id, child.tenant_id as tenant, 'users' as refers_to, parent.tenant_id as of_tenant
  from public.api_keys as child join public.users as parent on parent.id = child.user_id
  where child.tenant_id <> parent.tenant_id;

select 'jobs' as relation, child.id, child.tenant_id as tenant, 'users' as refers_to, parent.tenant_id as of_tenant
  from public.jobs as child join public.users as parent on parent.id = child.user_id
  where child.tenant_id <> parent.tenant_id;

select 'webhooks' as relation, child.id, child.tenant_id as tenant, 'users' as refers_to, parent.tenant_id as of_tenant
  from public.webhooks as child join public.users as parent on parent.id = child.user_id
  where child.tenant_id <> parent.tenant_id;

select 'idempotency_keys' as relation, child.id, child.tenant_id as tenant, 'users' as refers_to, parent.tenant_id as of_tenant
  from public.idempotency_keys as child join public.users as parent on parent.id = child.user_id
  where child.tenant_id <> parent.tenant_id;

select 'feature_flags' as relation, child.id, child.tenant_id as tenant, 'users' as refers_to, parent.tenant_id as of_tenant
  from public.feature_flags as child join public.users as parent on parent.id = child.user_id
  where child.tenant_id <> parent.tenant_id;

select 'executions' as relation, child.id, child.tenant_id as tenant, 'jobs' as refers_to, parent.tenant_id as of_tenant
  from public.executions as child join public.jobs as parent on parent.id = child.job_id
  where child.tenant_id <> parent.tenant_id;

select 'matches' as relation, child.id, child.tenant_id as tenant, 'executions' as refers_to, parent.tenant_id as of_tenant
  from public.matches as child join public.executions as parent on parent.id = child.execution_id
  where child.tenant_id <> parent.tenant_id;

select 'matches' as relation, child.id, child.tenant_id as tenant, 'jobs' as refers_to, parent.tenant_id as of_tenant
  from public.matches as child join public.jobs as parent on parent.id = child.job_id
  where child.tenant_id <> parent.tenant_id;

select 'unmatched' as relation, child.id, child.tenant_id as tenant, 'executions' as refers_to, parent.tenant_id as of_tenant
  from public.unmatched as child join public.executions as parent on parent.id = child.execution_id
  where child.tenant_id <> parent.tenant_id;

select 'unmatched' as relation, child.id, child.tenant_id as tenant, 'jobs' as refers_to, parent.tenant_id as of_tenant
  from public.unmatched as child join public.jobs as parent on parent.id = child.job_id
  where child.tenant_id <> parent.tenant_id;

select 'reports' as relation, child.id, child.tenant_id as tenant, 'executions' as refers_to, parent.tenant_id as of_tenant
  from public.reports as child join public.executions as parent on parent.id = child.execution_id
  where child.tenant_id <> parent.tenant_id;

select 'reports' as relation, child.id, child.tenant_id as tenant, 'jobs' as refers_to, parent.tenant_id as of_tenant
  from public.reports as child join public.jobs as parent on parent.id = child.job_id
  where child.tenant_id <> parent.tenant_id;

select 'snapshots' as relation, child.id, child.tenant_id as tenant, 'event_store' as refers_to, parent.tenant_id as of_tenant
  from public.snapshots as child join public.event_store as parent on parent.event_id = child.event_id
  where child.tenant_id <> parent.tenant_id;
