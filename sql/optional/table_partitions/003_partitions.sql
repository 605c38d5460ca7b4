-- runbook: no-transaction

-- Partitions by month: 3 of 3, each table in a transaction of its own.

select private.partition_by_month('matches', 'matched_at');
select private.partition_by_month('unmatched', 'created_at');
select private.partition_by_month('executions', 'started_at');
select private.partition_by_month('audit_logs', 'timestamp');

select create_table_partitions(3);

select private.fill_empty_views();
