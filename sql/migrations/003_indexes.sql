-- runbook: no-transaction

-- The Settler schema, 3 of 5: indexes, each built while everybody reads and writes.
--
-- The policy adds «tenant_id = …» to every query of the API, so that its lists begin with tenant_id. Every foreign key
-- has an index that begins with it, for the deletes on the other side; those of sparse columns leave NULL out.

-- Of UNIQUE constraints: 004 makes them of these.
create unique index concurrently if not exists tenants_slug_key
  on public.tenants (slug);
create unique index concurrently if not exists users_tenant_id_email_key
  on public.users (tenant_id, email);
create unique index concurrently if not exists idempotency_keys_user_id_key_key
  on public.idempotency_keys (user_id, key);
create unique index concurrently if not exists tenant_usage_tenant_id_metric_type_period_start_key
  on public.tenant_usage (tenant_id, metric_type, period_start);
create unique index concurrently if not exists feature_flags_name_tenant_id_user_id_key
  on public.feature_flags (name, tenant_id, user_id);
create unique index concurrently if not exists event_store_event_id_key
  on public.event_store (event_id);
create unique index concurrently if not exists snapshots_aggregate_id_aggregate_type_snapshot_version_key
  on public.snapshots (aggregate_id, aggregate_type, snapshot_version);
create unique index concurrently if not exists saga_state_saga_id_saga_type_key
  on public.saga_state (saga_id, saga_type);

-- What the foreign keys that keep a row and its parent in one tenant refer to.
create unique index concurrently if not exists users_id_tenant_id_key
  on public.users (id, tenant_id);
create unique index concurrently if not exists jobs_id_tenant_id_key
  on public.jobs (id, tenant_id);
create unique index concurrently if not exists executions_id_tenant_id_key
  on public.executions (id, tenant_id);
create unique index concurrently if not exists event_store_event_id_tenant_id_key
  on public.event_store (event_id, tenant_id);

-- What UNIQUE constraints let through where a column is NULL.
create unique index concurrently if not exists users_email_without_tenant_key
  on public.users (email) where tenant_id is null;
create unique index concurrently if not exists feature_flags_name_scope_key
  on public.feature_flags (
    name, coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'),
    coalesce(user_id, '00000000-0000-0000-0000-000000000000')
  ) where tenant_id is null or user_id is null;
create unique index concurrently if not exists blocked_ips_active_key
  on public.blocked_ips (
    ip, coalesce(tenant_id, '00000000-0000-0000-0000-000000000000')
  ) where unblocked_at is null;

-- For the API's queries and for foreign keys.
create index concurrently if not exists idx_tenants_parent
  on public.tenants (parent_tenant_id) where parent_tenant_id is not null;
create index concurrently if not exists idx_api_keys_tenant_prefix
  on public.api_keys (tenant_id, key_prefix);
create index concurrently if not exists idx_api_keys_user_id
  on public.api_keys (user_id);
create index concurrently if not exists idx_jobs_tenant_created_at
  on public.jobs (tenant_id, created_at desc);
create index concurrently if not exists idx_jobs_user_id
  on public.jobs (user_id);
create index concurrently if not exists idx_executions_tenant_started
  on public.executions (tenant_id, started_at desc);
create index concurrently if not exists idx_executions_running_tenant_started
  on public.executions (tenant_id, started_at desc) where status = 'running';
create index concurrently if not exists idx_executions_job_started
  on public.executions (job_id, started_at desc);
create index concurrently if not exists idx_matches_tenant_matched
  on public.matches (tenant_id, matched_at desc);
create index concurrently if not exists idx_matches_job_confidence
  on public.matches (job_id, tenant_id, confidence desc);
create index concurrently if not exists idx_matches_execution_id
  on public.matches (execution_id);
create index concurrently if not exists idx_unmatched_tenant_created
  on public.unmatched (tenant_id, created_at desc);
create index concurrently if not exists idx_unmatched_job_id
  on public.unmatched (job_id);
create index concurrently if not exists idx_unmatched_execution_id
  on public.unmatched (execution_id);
create index concurrently if not exists idx_reports_tenant_generated
  on public.reports (tenant_id, generated_at desc);
create index concurrently if not exists idx_reports_job_generated
  on public.reports (job_id, generated_at desc);
create index concurrently if not exists idx_reports_execution_id
  on public.reports (execution_id);
create index concurrently if not exists idx_webhooks_tenant_id
  on public.webhooks (tenant_id);
create index concurrently if not exists idx_webhooks_user_id
  on public.webhooks (user_id);
create index concurrently if not exists idx_webhook_payloads_tenant_received
  on public.webhook_payloads (tenant_id, received_at desc);
create index concurrently if not exists idx_webhook_payloads_unprocessed
  on public.webhook_payloads (tenant_id, received_at) where processed = false;
create index concurrently if not exists idx_webhook_deliveries_webhook_created
  on public.webhook_deliveries (webhook_id, created_at desc);
create index concurrently if not exists idx_webhook_deliveries_retry
  on public.webhook_deliveries (next_retry_at) where status = 'failed';
create index concurrently if not exists idx_webhook_deliveries_webhook_retry
  on public.webhook_deliveries (webhook_id, next_retry_at) where status = 'failed';
create index concurrently if not exists idx_audit_logs_tenant_timestamp
  on public.audit_logs (tenant_id, "timestamp" desc);
create index concurrently if not exists idx_audit_logs_user_timestamp
  on public.audit_logs (user_id, "timestamp");
create index concurrently if not exists idx_audit_logs_api_key_id
  on public.audit_logs (api_key_id) where api_key_id is not null;
create index concurrently if not exists idx_idempotency_tenant_expires
  on public.idempotency_keys (tenant_id, expires_at);
create index concurrently if not exists idx_idempotency_expires
  on public.idempotency_keys (expires_at);
create index concurrently if not exists idx_revoked_tokens_expires_at
  on public.revoked_tokens (expires_at);
create index concurrently if not exists idx_blocked_ips_tenant_id
  on public.blocked_ips (tenant_id);
create index concurrently if not exists idx_security_events_tenant_created
  on public.security_events (tenant_id, created_at desc);
create index concurrently if not exists idx_security_events_user_id
  on public.security_events (user_id) where user_id is not null;
create index concurrently if not exists idx_security_events_api_key_id
  on public.security_events (api_key_id) where api_key_id is not null;
create index concurrently if not exists idx_security_events_resolved_by
  on public.security_events (resolved_by) where resolved_by is not null;
create index concurrently if not exists idx_feature_flags_tenant_id
  on public.feature_flags (tenant_id);
create index concurrently if not exists idx_feature_flags_user_id
  on public.feature_flags (user_id);
create index concurrently if not exists idx_feature_flag_changes_flag_created
  on public.feature_flag_changes (feature_flag_id, created_at desc);
create index concurrently if not exists idx_feature_flag_changes_changed_by
  on public.feature_flag_changes (changed_by) where changed_by is not null;
create index concurrently if not exists idx_event_store_tenant
  on public.event_store (tenant_id, created_at);
create index concurrently if not exists idx_event_store_aggregate_replay
  on public.event_store (aggregate_id, aggregate_type, tenant_id, id);
create index concurrently if not exists idx_snapshots_tenant
  on public.snapshots (tenant_id, aggregate_id, aggregate_type, snapshot_version desc);
create index concurrently if not exists idx_snapshots_event_id
  on public.snapshots (event_id);
create index concurrently if not exists idx_saga_state_tenant
  on public.saga_state (tenant_id, status);
create index concurrently if not exists idx_dlq_tenant
  on public.dead_letter_queue (tenant_id, created_at);
create index concurrently if not exists idx_dlq_unresolved_tenant
  on public.dead_letter_queue (tenant_id, created_at) where resolved_at is null;
create index concurrently if not exists idx_dlq_event_id
  on public.dead_letter_queue (event_id) where event_id is not null;
create index concurrently if not exists idx_reconciliation_summary_tenant_started
  on public.reconciliation_summary (tenant_id, started_at desc);
create index concurrently if not exists idx_reconciliation_summary_job
  on public.reconciliation_summary (job_id);
create index concurrently if not exists idx_error_hotspots_tenant_last
  on public.error_hotspots_view (tenant_id, last_occurred_at desc);
create index concurrently if not exists idx_error_hotspots_job
  on public.error_hotspots_view (job_id);
