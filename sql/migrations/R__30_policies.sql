-- Policies: who sees and writes which rows, for every role but the owner. 001 has switched row level security on.
--
-- A policy's comment is its rule in words and a mark of its definition. One without exactly that comment is replaced, in
-- the same transaction; any other is left alone, its table unlocked.

set local search_path = public, pg_temp;
set local client_min_messages = warning;

do $$
declare
  wanted record;
  definition text;
  remark text;
begin
  for wanted in
    with own (condition) as (values ('tenant_id = (select current_tenant_id())'))
    select * from (
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
       'tenant_id is null and user_id is null and (select current_tenant_id()) is not null', null,
       'Flags for everyone: every tenant reads them, none writes them.'),
      ('global_rows_blocked_ips', 'blocked_ips', 'select',
       'tenant_id is null and (select current_tenant_id()) is not null', null,
       'Blocks for everyone: every tenant reads them, none writes them.'),
      ('global_rows_security_events', 'security_events', 'insert',
       null, 'tenant_id is null and user_id is null and api_key_id is null and resolved_by is null',
       'Events before a tenant is known: every session reports them, none reads them.')
    ) as other
    ) as policy
      order by (select count(*) from pg_constraint where confrelid = policy.relation::regclass) -- children first
  loop
    definition := concat_ws(' ',
      format('create policy %I on %I for %s', wanted.name, wanted.relation, wanted.command),
      'using (' || wanted.readable || ')', 'with check (' || wanted.writable || ')'
    );
    remark := format('%s [%s]', wanted.rule, left(md5(definition), 8));
    if not exists (
      select from pg_policy
        where polrelid = wanted.relation::regclass and polname = wanted.name
          and obj_description(oid, 'pg_policy') = remark
    ) then
      execute format('drop policy if exists %I on %I', wanted.name, wanted.relation);
      execute definition;
      execute format('comment on policy %I on %I is %L', wanted.name, wanted.relation, remark);
    end if;
  end loop;
end
$$;
