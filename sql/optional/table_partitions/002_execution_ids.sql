-- runbook: no-transaction

-- Partitions by month: 2 of 3, the ids of executions and what refers to them. Everybody reads and writes meanwhile.

insert into private.execution_ids (id, tenant_id)
  select id, tenant_id from public.executions on conflict (id) do nothing;

select private.refer_to_execution_ids('matches');
select private.refer_to_execution_ids('unmatched');
select private.refer_to_execution_ids('reports');

alter table public.matches validate constraint matches_execution_id_fkey;
alter table public.matches validate constraint matches_execution_id_tenant_id_fkey;
alter table public.unmatched validate constraint unmatched_execution_id_fkey;
alter table public.unmatched validate constraint unmatched_execution_id_tenant_id_fkey;
alter table public.reports validate constraint reports_execution_id_fkey;
alter table public.reports validate constraint reports_execution_id_tenant_id_fkey;
