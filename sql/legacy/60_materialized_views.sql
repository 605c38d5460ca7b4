-- Statistics in public, readable by every tenant. Two have no UNIQUE index, so that the refresh of all fails.

create materialized view mv_reconciliation_summary_daily as
  select tenant_id, started_at::date as day, count(*) as executions, avg(duration_ms) as average_duration_ms
    from executions group by tenant_id, started_at::date;
create unique index idx_mv_reconciliation_summary_daily on mv_reconciliation_summary_daily (tenant_id, day);

create materialized view mv_job_performance as
  select j.tenant_id, j.id as job_id, count(e.id) as runs, avg(e.duration_ms) as average_duration_ms
    from jobs j left join executions e on e.job_id = j.id group by j.tenant_id, j.id;
create unique index idx_mv_job_performance on mv_job_performance (tenant_id, job_id);

create materialized view mv_tenant_usage_hourly as
  select tenant_id, date_trunc('hour', started_at) as hour, count(*) as executions
    from executions group by tenant_id, date_trunc('hour', started_at);

create materialized view mv_match_accuracy_by_job as
  select tenant_id, job_id, count(*) as matches, avg(confidence) as average_confidence
    from matches group by tenant_id, job_id with no data;

create function refresh_all_materialized_views() returns void language plpgsql as $$
begin
  refresh materialized view concurrently mv_reconciliation_summary_daily;
  refresh materialized view concurrently mv_job_performance;
  refresh materialized view concurrently mv_tenant_usage_hourly;
  refresh materialized view concurrently mv_match_accuracy_by_job;
end $$;
