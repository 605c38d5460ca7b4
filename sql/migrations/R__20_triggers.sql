-- Triggers. They look only where a parent or the tenant is named: other updates cost nothing. The text is
-- PostgreSQL's own form of the definition, so that an equal trigger is left alone, its table unlocked, and an older one
-- replaced.
set local search_path = public, pg_temp;
set local client_min_messages = warning;

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
    union all
    select 'keep_references_in_tenant', relation, format(
        'CREATE TRIGGER keep_references_in_tenant BEFORE INSERT OR UPDATE OF %s ON public.%s '
        'FOR EACH ROW EXECUTE FUNCTION private.keep_references_in_tenant(%s)', columns, relation, arguments
      )
      from (values
        ('audit_logs', 'tenant_id, user_id, api_key_id',
         $args$'user_id', 'users', 'id', 'api_key_id', 'api_keys', 'id'$args$),
        ('security_events', 'tenant_id, user_id, api_key_id, resolved_by',
         $args$'user_id', 'users', 'id', 'api_key_id', 'api_keys', 'id', 'resolved_by', 'users', 'id'$args$),
        ('feature_flag_changes', 'feature_flag_id, changed_by', $args$'changed_by', 'users', 'id'$args$),
        ('dead_letter_queue', 'event_id, tenant_id', $args$'event_id', 'event_store', 'event_id'$args$)
      ) as keeping (relation, columns, arguments)
    union all
    select 'keep_parent_of_tenant', 'tenants',
        'CREATE TRIGGER keep_parent_of_tenant BEFORE INSERT OR UPDATE OF parent_tenant_id ON public.tenants '
        'FOR EACH ROW EXECUTE FUNCTION private.keep_parent_of_tenant()'
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
