-- Functions. They run with the caller's rights and under the caller's policies, unless a comment says why not. All have a
-- fixed search_path and name their tables in full. What was made by another version is replaced; no table is locked.
-- Timestamps are without a time zone and in UTC: a function that compares one with now() has that zone, whatever the session's.

set local search_path = public, pg_temp;
set local client_min_messages = warning;

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
                       p_table, p_parent, p_parent_id),
      hint = 'The session sees the rows of app.current_tenant_id: '
        || coalesce(public.current_tenant_id()::text, 'none is set') || '.';
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

-- What foreign keys with ON DELETE SET NULL refer to is of the row's own tenant, or of none. The others are composite
-- keys with the tenant in them; SET NULL would empty the tenant with the reference. Logs outlive a change of what they
-- refer to, so that only what is written is looked at. Arguments of the trigger: column, parent, its key, and again.
-- SECURITY DEFINER: under the policies it would not find a row of another tenant, and let it pass.
create or replace function private.keep_references_in_tenant() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  written constant jsonb := to_jsonb(new);
  tenant uuid := (written ->> 'tenant_id')::uuid;
  other uuid;
begin
  if tg_table_name = 'feature_flag_changes' then
    select f.tenant_id into tenant from public.feature_flags as f where f.id = new.feature_flag_id;
  end if;
  for n in 0 .. tg_nargs - 1 by 3 loop
    if tenant is null or written ->> tg_argv[n] is null then
      continue;
    end if;
    execute format('select tenant_id from public.%I where %I = $1', tg_argv[n + 1], tg_argv[n + 2])
      into other using (written ->> tg_argv[n])::uuid;
    if other <> tenant then
      raise check_violation using
        message = format('%s.%s refers to a row of %s that belongs to another tenant: %s',
                         tg_table_name, tg_argv[n], tg_argv[n + 1], written ->> tg_argv[n]);
    end if;
  end loop;
  return new;
end
$$;

-- A tenant's place below another one is the operator's: the policies let a tenant write its own row, and a foreign key
-- alone would find any tenant.
create or replace function private.keep_parent_of_tenant() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if row_security_active('public.tenants') and new.parent_tenant_id is not null
    and (tg_op = 'INSERT' or new.parent_tenant_id is distinct from old.parent_tenant_id)
  then
    raise insufficient_privilege using
      message = format('tenants.parent_tenant_id is not for %s to set', current_user),
      hint = 'The owner of the schema places a tenant below another one.';
  end if;
  return new;
end
$$;

-- Whether a tenant may use so much more of a quota (or, for rateLimitRpm, so many requests in this minute). False if
-- the tenant, the quota or its limit does not exist; never NULL.
create or replace function check_tenant_quota(
  p_tenant_id uuid, p_quota_type text, p_requested_value bigint default 1
) returns boolean
language plpgsql stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
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
set timezone = 'UTC'
as $$
declare
  month_start constant timestamp := date_trunc('month', now());
  amount constant bigint := coalesce(p_value, 0);
  storage constant bigint := case p_quota_type when 'storageBytes' then amount else 0 end;
  jobs constant bigint := case p_quota_type when 'concurrentJobs' then amount else 0 end;
  reconciliations bigint;
begin
  if p_quota_type in ('monthlyReconciliations', 'reconciliation') then
    insert into public.tenant_usage as u (tenant_id, metric_type, metric_value, period_start, period_end)
      values (p_tenant_id, 'reconciliation', greatest(amount, 0), month_start, month_start + interval '1 month')
      on conflict (tenant_id, metric_type, period_start)
        do update set metric_value = greatest(u.metric_value + amount, 0)
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

-- Asked for every request, most of them before the login: blocks for everyone must count without a tenant, too. A session
-- that has a tenant is told of that one's blocks only.
create or replace function is_ip_blocked(p_ip varchar, p_tenant_id uuid default null) returns boolean
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.require_privilege('public.blocked_ips', 'select');
  return exists (
    select from public.blocked_ips as b
      where b.ip = p_ip and b.unblocked_at is null and (
        b.tenant_id is null
        or b.tenant_id = p_tenant_id and p_tenant_id = coalesce(public.current_tenant_id(), p_tenant_id)
      )
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
set timezone = 'UTC'
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
