-- runbook: no-transaction

-- The Settler schema, 4 of 5: the rules between rows.
--
-- Each is a short transaction that locks one table, or a child and its parent: no writer waits for more than that, and none
-- holds up another. UNIQUE constraints are made of the indexes of 003. All others begin NOT VALID: they hold for every row
-- that is written from here on, and reading the rows that are there is left to 005, which blocks nobody.

-- Adds a rule where the table has none of the same meaning; one of the same name with another meaning gives way.
-- The parent is locked first, as by a transaction that writes a parent and then its children: neither waits for the other.
create or replace function private.add_rule(p_table text, p_name text, p_definition text) returns void
language plpgsql
set search_path = public, pg_temp
as $$
declare
  parent constant text := substring(p_definition from 'REFERENCES (\w+)');
begin
  if exists (
    select from pg_constraint
      where conrelid = p_table::regclass
        and replace(pg_get_constraintdef(oid, true), ' NOT VALID', '') = p_definition
  ) then
    return;
  end if;
  if parent is not null then
    execute format('lock table %I in share row exclusive mode', parent);
  end if;
  if exists (select from pg_constraint where conrelid = p_table::regclass and conname = p_name) then
    execute format('alter table %I drop constraint %I', p_table, p_name);
  end if;
  if p_definition like 'UNIQUE %' then
    execute format('alter table %I add constraint %I unique using index %I', p_table, p_name, p_name);
  else
    execute format('alter table %I add constraint %I %s not valid', p_table, p_name, p_definition);
  end if;
end
$$;

-- A user is unique within a tenant, no longer in the whole database.
alter table public.users drop constraint if exists users_email_key;

select private.add_rule('tenants', 'tenants_slug_key',
  'UNIQUE (slug)');
select private.add_rule('users', 'users_tenant_id_email_key',
  'UNIQUE (tenant_id, email)');
select private.add_rule('idempotency_keys', 'idempotency_keys_user_id_key_key',
  'UNIQUE (user_id, key)');
select private.add_rule('tenant_usage', 'tenant_usage_tenant_id_metric_type_period_start_key',
  'UNIQUE (tenant_id, metric_type, period_start)');
select private.add_rule('feature_flags', 'feature_flags_name_tenant_id_user_id_key',
  'UNIQUE (name, tenant_id, user_id)');
select private.add_rule('event_store', 'event_store_event_id_key',
  'UNIQUE (event_id)');
select private.add_rule('snapshots', 'snapshots_aggregate_id_aggregate_type_snapshot_version_key',
  'UNIQUE (aggregate_id, aggregate_type, snapshot_version)');
select private.add_rule('saga_state', 'saga_state_saga_id_saga_type_key',
  'UNIQUE (saga_id, saga_type)');

select private.add_rule('tenants', 'tenants_parent_check',
  'CHECK (parent_tenant_id <> id)');
select private.add_rule('matches', 'matches_confidence_check',
  'CHECK (confidence >= 0::numeric AND confidence <= 1::numeric)');
select private.add_rule('feature_flags', 'feature_flags_rollout_percentage_check',
  'CHECK (rollout_percentage >= 0 AND rollout_percentage <= 100)');

select private.add_rule('tenants', 'tenants_parent_tenant_id_fkey',
  'FOREIGN KEY (parent_tenant_id) REFERENCES tenants(id) ON DELETE SET NULL');
select private.add_rule('users', 'users_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('api_keys', 'api_keys_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE');
select private.add_rule('api_keys', 'api_keys_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('jobs', 'jobs_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE');
select private.add_rule('jobs', 'jobs_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('executions', 'executions_job_id_fkey',
  'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE');
select private.add_rule('executions', 'executions_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('matches', 'matches_execution_id_fkey',
  'FOREIGN KEY (execution_id) REFERENCES executions(id) ON DELETE CASCADE');
select private.add_rule('matches', 'matches_job_id_fkey',
  'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE');
select private.add_rule('matches', 'matches_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('unmatched', 'unmatched_execution_id_fkey',
  'FOREIGN KEY (execution_id) REFERENCES executions(id) ON DELETE CASCADE');
select private.add_rule('unmatched', 'unmatched_job_id_fkey',
  'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE');
select private.add_rule('unmatched', 'unmatched_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('reports', 'reports_execution_id_fkey',
  'FOREIGN KEY (execution_id) REFERENCES executions(id) ON DELETE CASCADE');
select private.add_rule('reports', 'reports_job_id_fkey',
  'FOREIGN KEY (job_id) REFERENCES jobs(id) ON DELETE CASCADE');
select private.add_rule('reports', 'reports_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('webhooks', 'webhooks_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE');
select private.add_rule('webhooks', 'webhooks_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('webhook_payloads', 'webhook_payloads_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('webhook_deliveries', 'webhook_deliveries_webhook_id_fkey',
  'FOREIGN KEY (webhook_id) REFERENCES webhooks(id) ON DELETE CASCADE');
select private.add_rule('audit_logs', 'audit_logs_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE SET NULL');
select private.add_rule('audit_logs', 'audit_logs_api_key_id_fkey',
  'FOREIGN KEY (api_key_id) REFERENCES api_keys(id) ON DELETE SET NULL');
select private.add_rule('audit_logs', 'audit_logs_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE SET NULL');
select private.add_rule('idempotency_keys', 'idempotency_keys_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE');
select private.add_rule('idempotency_keys', 'idempotency_keys_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('blocked_ips', 'blocked_ips_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('security_events', 'security_events_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE SET NULL');
select private.add_rule('security_events', 'security_events_api_key_id_fkey',
  'FOREIGN KEY (api_key_id) REFERENCES api_keys(id) ON DELETE SET NULL');
select private.add_rule('security_events', 'security_events_resolved_by_fkey',
  'FOREIGN KEY (resolved_by) REFERENCES users(id) ON DELETE SET NULL');
select private.add_rule('security_events', 'security_events_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE SET NULL');
select private.add_rule('tenant_usage', 'tenant_usage_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('tenant_quota_usage', 'tenant_quota_usage_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('feature_flags', 'feature_flags_user_id_fkey',
  'FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE');
select private.add_rule('feature_flags', 'feature_flags_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('feature_flag_changes', 'feature_flag_changes_feature_flag_id_fkey',
  'FOREIGN KEY (feature_flag_id) REFERENCES feature_flags(id) ON DELETE CASCADE');
select private.add_rule('feature_flag_changes', 'feature_flag_changes_changed_by_fkey',
  'FOREIGN KEY (changed_by) REFERENCES users(id) ON DELETE SET NULL');
select private.add_rule('event_store', 'event_store_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('snapshots', 'snapshots_event_id_fkey',
  'FOREIGN KEY (event_id) REFERENCES event_store(event_id) ON DELETE CASCADE');
select private.add_rule('snapshots', 'snapshots_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('saga_state', 'saga_state_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('dead_letter_queue', 'dead_letter_queue_event_id_fkey',
  'FOREIGN KEY (event_id) REFERENCES event_store(event_id) ON DELETE SET NULL');
select private.add_rule('dead_letter_queue', 'dead_letter_queue_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('reconciliation_summary', 'reconciliation_summary_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('tenant_usage_view', 'tenant_usage_view_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');
select private.add_rule('error_hotspots_view', 'error_hotspots_view_tenant_id_fkey',
  'FOREIGN KEY (tenant_id) REFERENCES tenants(id) ON DELETE CASCADE');

-- A row and its parent are of one tenant, whoever writes. Where one of the two has no tenant these keys are silent; the
-- plain key beside each still holds, and the triggers give a row its parent's tenant.
select private.add_rule('api_keys', 'api_keys_user_id_tenant_id_fkey',
  'FOREIGN KEY (user_id, tenant_id) REFERENCES users(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('jobs', 'jobs_user_id_tenant_id_fkey',
  'FOREIGN KEY (user_id, tenant_id) REFERENCES users(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('executions', 'executions_job_id_tenant_id_fkey',
  'FOREIGN KEY (job_id, tenant_id) REFERENCES jobs(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('matches', 'matches_execution_id_tenant_id_fkey',
  'FOREIGN KEY (execution_id, tenant_id) REFERENCES executions(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('matches', 'matches_job_id_tenant_id_fkey',
  'FOREIGN KEY (job_id, tenant_id) REFERENCES jobs(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('unmatched', 'unmatched_execution_id_tenant_id_fkey',
  'FOREIGN KEY (execution_id, tenant_id) REFERENCES executions(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('unmatched', 'unmatched_job_id_tenant_id_fkey',
  'FOREIGN KEY (job_id, tenant_id) REFERENCES jobs(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('reports', 'reports_execution_id_tenant_id_fkey',
  'FOREIGN KEY (execution_id, tenant_id) REFERENCES executions(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('reports', 'reports_job_id_tenant_id_fkey',
  'FOREIGN KEY (job_id, tenant_id) REFERENCES jobs(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('webhooks', 'webhooks_user_id_tenant_id_fkey',
  'FOREIGN KEY (user_id, tenant_id) REFERENCES users(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('idempotency_keys', 'idempotency_keys_user_id_tenant_id_fkey',
  'FOREIGN KEY (user_id, tenant_id) REFERENCES users(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('feature_flags', 'feature_flags_user_id_tenant_id_fkey',
  'FOREIGN KEY (user_id, tenant_id) REFERENCES users(id, tenant_id) ON DELETE CASCADE');
select private.add_rule('snapshots', 'snapshots_event_id_tenant_id_fkey',
  'FOREIGN KEY (event_id, tenant_id) REFERENCES event_store(event_id, tenant_id) ON DELETE CASCADE');

drop function private.add_rule(text, text, text);
