-- Statistics. Materialized views know no policies. They live in the schema private, on which the API's role has no right,
-- and are read through views in public that show a tenant its own rows; security_barrier keeps a caller's functions from
-- seeing others. Each has a UNIQUE index and is filled at once: REFRESH … CONCURRENTLY needs both.
--
-- A view's comment is a mark of its definition: one without exactly that mark is made anew, with the view that reads it;
-- any other is left alone, with its rows.

set local search_path = public, pg_temp;
set local client_min_messages = warning;

do $$
declare
  wanted record;
begin
  for wanted in
    select name, key, definition, format('definition %s', left(md5(key || definition), 8)) as mark from (values
      ('mv_reconciliation_summary_daily', 'tenant_id, day', $definition$
      select e.tenant_id, e.started_at::date as day, count(*) as executions,
          coalesce(sum(m.matched), 0)::bigint as matched, coalesce(sum(u.unmatched), 0)::bigint as unmatched,
          round(avg(e.duration_ms)) as average_duration_ms
        from public.executions as e
          left join (select execution_id, count(*) as matched from public.matches group by execution_id) as m
            on m.execution_id = e.id
          left join (select execution_id, count(*) as unmatched from public.unmatched group by execution_id) as u
            on u.execution_id = e.id
        where e.tenant_id is not null and e.started_at is not null
        group by e.tenant_id, e.started_at::date
      $definition$),
      ('mv_job_performance', 'tenant_id, job_id', $definition$
      select j.tenant_id, j.id as job_id, count(e.id) as runs,
          count(*) filter (where e.status = 'completed') as completed,
          count(*) filter (where e.status = 'failed') as failed,
          round(
            count(*) filter (where e.status = 'completed')::numeric
              / nullif(count(*) filter (where e.status::text in ('completed', 'failed')), 0), 4
          ) as success_rate,
          round(avg(e.duration_ms)) as average_duration_ms, max(e.duration_ms) as longest_duration_ms
        from public.jobs as j left join public.executions as e on e.job_id = j.id
        where j.tenant_id is not null
        group by j.tenant_id, j.id
      $definition$),
      ('mv_tenant_usage_hourly', 'tenant_id, hour', $definition$
      select tenant_id, hour, sum(executions)::bigint as executions, sum(matches)::bigint as matches
        from (
          select tenant_id, date_trunc('hour', started_at) as hour, count(*) as executions, 0 as matches
            from public.executions group by 1, 2
          union all
          select tenant_id, date_trunc('hour', matched_at), 0, count(*)
            from public.matches group by 1, 2
        ) as counted
        where tenant_id is not null and hour is not null
        group by tenant_id, hour
      $definition$),
      ('mv_match_accuracy_by_job', 'tenant_id, job_id', $definition$
      select tenant_id, job_id, count(*) as matches, round(avg(confidence), 4) as average_confidence
        from public.matches
        where tenant_id is not null
        group by tenant_id, job_id
      $definition$)
    ) as statistic (name, key, definition)
  loop
    if obj_description(to_regclass('private.' || wanted.name), 'pg_class') is distinct from wanted.mark then
      execute format('drop materialized view if exists private.%I cascade', wanted.name);
      execute format('create materialized view private.%I as %s', wanted.name, wanted.definition);
      execute format('create unique index %I on private.%I (%s)', wanted.name || '_key', wanted.name, wanted.key);
      execute format('comment on materialized view private.%I is %L', wanted.name, wanted.mark);
    end if;
  end loop;
end
$$;

create or replace view reconciliation_summary_daily with (security_barrier = true) as
  select tenant_id, day, executions, matched, unmatched, average_duration_ms
    from private.mv_reconciliation_summary_daily
    where tenant_id = (select current_tenant_id());

create or replace view job_performance with (security_barrier = true) as
  select tenant_id, job_id, runs, completed, failed, success_rate, average_duration_ms, longest_duration_ms
    from private.mv_job_performance
    where tenant_id = (select current_tenant_id());

create or replace view tenant_usage_hourly with (security_barrier = true) as
  select tenant_id, hour, executions, matches
    from private.mv_tenant_usage_hourly
    where tenant_id = (select current_tenant_id());

create or replace view match_accuracy_by_job with (security_barrier = true) as
  select tenant_id, job_id, matches, average_confidence
    from private.mv_match_accuracy_by_job
    where tenant_id = (select current_tenant_id());
