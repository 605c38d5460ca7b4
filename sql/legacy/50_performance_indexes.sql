-- Indexes by the dozen, most of them beginning with the same columns.

create index idx_jobs_tenant_created_at on jobs (tenant_id, created_at desc);
create index idx_jobs_list_covering on jobs (tenant_id, created_at desc) include (id, name, status);
create index idx_jobs_cursor_pagination on jobs (tenant_id, created_at desc, id desc);
create index idx_jobs_active_tenant_created on jobs (tenant_id, created_at desc) where status = 'active';
create index idx_executions_running_tenant_started on executions (tenant_id, started_at desc) where status = 'running';
create index idx_executions_list_covering on executions (tenant_id, started_at desc) include (id, job_id, status);
create index idx_executions_cursor_pagination on executions (tenant_id, started_at desc, id desc);
create index idx_matches_tenant_execution on matches (tenant_id, execution_id, matched_at desc);
create index idx_matches_tenant_job_confidence on matches (tenant_id, job_id, confidence desc);
create index idx_matches_cursor_pagination on matches (tenant_id, matched_at desc, id desc);
create index idx_unmatched_tenant_execution on unmatched (tenant_id, execution_id, created_at desc);
create index idx_reports_tenant_execution on reports (tenant_id, execution_id, generated_at desc);
create index idx_audit_logs_tenant_timestamp on audit_logs (tenant_id, "timestamp" desc);
create index idx_webhooks_active_tenant on webhooks (tenant_id, created_at desc) where status = 'active';
create index idx_api_keys_active_tenant on api_keys (tenant_id, created_at desc) where revoked_at is null;
