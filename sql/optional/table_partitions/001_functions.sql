-- Partitions by month of executions, matches, unmatched and audit_logs: 1 of 3, what the others call.
--
-- Opt-in: migrate_optional: [table_partitions]. Take it at tens of millions of rows, when old months are to be dropped whole.
-- What it costs:
--
-- * The keys of the months are nullable, and a primary key of a partitioned table must hold its partition key. Each
--   partition has a primary key of its own; the whole has none. ON CONFLICT (id) no longer works on these tables.
-- * That an execution's id is unique, and what matches, unmatched and reports refer to, is in private.execution_ids: one
--   more row a run, kept by a trigger.
-- * The rows that are there become one partition, «_history», up to the end of the present month; not one of them is
--   copied. Those without a date or with one beyond go to the default partition. To attach the history reads it once
--   while nobody can write to it.
-- * A row may move between partitions, but a concurrent change of it then fails instead of waiting.
--
-- Partitions are in a schema on which the application has no right, with row level security on and no policy: its way is
-- through the table, where the policies are.

set local search_path = public, pg_temp;
set local client_min_messages = warning;

create schema if not exists partitions;

create table if not exists private.execution_ids (
  id uuid primary key,
  tenant_id uuid,
  unique (id, tenant_id)
);
alter table private.execution_ids enable row level security;

-- SECURITY DEFINER, because the application has no right on private.execution_ids.
-- A row that moves to another partition is deleted here and inserted there, before either trigger runs.
create or replace function private.keep_execution_ids() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if tg_op = 'TRUNCATE' then
    raise feature_not_supported using
      message = 'executions is partitioned: TRUNCATE would leave its matches behind',
      hint = 'DELETE the rows, or drop old months with drop_table_partitions().';
  elsif tg_op = 'DELETE' then
    if not exists (select from public.executions as e where e.id = old.id) then
      delete from private.execution_ids as i where i.id = old.id;
    end if;
    return null;
  elsif tg_op = 'UPDATE' then
    update private.execution_ids as i set id = new.id, tenant_id = new.tenant_id where i.id = old.id;
    return null;
  end if;
  insert into private.execution_ids (id, tenant_id) values (new.id, new.tenant_id) on conflict (id) do nothing;
  if not found then
    if (select count(*) from public.executions as e where e.id = new.id) > 1 then
      raise unique_violation using message = format('executions has a row with id %s already', new.id);
    end if;
    update private.execution_ids as i set tenant_id = new.tenant_id
      where i.id = new.id and i.tenant_id is distinct from new.tenant_id;
  end if;
  return null;
end
$$;

-- Lets a table refer to execution_ids where it refers to executions. 003 proves the keys for the rows that are there.
create or replace function private.refer_to_execution_ids(p_table text) returns void
language plpgsql
set search_path = public, pg_temp
as $$
begin
  if exists (
    select from pg_constraint
      where conrelid = p_table::regclass and confrelid = 'private.execution_ids'::regclass
  ) then
    return;
  end if;
  execute format(
    'alter table %1$I drop constraint %2$I, drop constraint %3$I,
       add constraint %2$I foreign key (execution_id)
         references private.execution_ids (id) on delete cascade not valid,
       add constraint %3$I foreign key (execution_id, tenant_id)
         references private.execution_ids (id, tenant_id) on delete cascade not valid',
    p_table, p_table || '_execution_id_fkey', p_table || '_execution_id_tenant_id_fkey'
  );
end
$$;

-- Makes a plain table the first partition of one of the same name, in one transaction, without copying it. Rules, indexes,
-- policies, triggers and grants go to the new table, views that read the old one are made again on it.
create or replace function private.partition_by_month(p_table text, p_key text) returns void
language plpgsql
set search_path = public, pg_temp
as $$
declare
  history constant text := p_table || '_history';
  rest constant text := p_table || '_default';
  bound constant timestamp := date_trunc('month', localtimestamp) + interval '1 month';
  old constant regclass := p_table::regclass;
  before text[]; -- statements that clear the way
  after text[]; -- statements that bring all back
  views text[];
  statement text;
  item record;
begin
  if (select relkind from pg_class where oid = old) = 'p' then
    return;
  end if;
  execute format('lock table %I in access exclusive mode', p_table);

  -- Views on it, and views on those: what is nearest to the table is dropped with all that reads it.
  for item in
    with recursive reading (view, depth) as (
      select distinct r.ev_class, 1 from pg_rewrite as r join pg_depend as d on d.objid = r.oid
        where d.classid = 'pg_rewrite'::regclass and d.refobjid = old and r.ev_class <> old
      union
      select r.ev_class, depth + 1
        from reading join pg_depend as d on d.refobjid = reading.view and d.classid = 'pg_rewrite'::regclass
          join pg_rewrite as r on r.oid = d.objid
        where r.ev_class <> reading.view
    )
    select c.oid, c.oid::regclass::text as name, max(depth) as depth, pg_get_viewdef(c.oid) as definition,
        case c.relkind when 'm' then 'materialized view' else 'view' end as kind, c.relacl, c.relowner,
        coalesce(' with (' || array_to_string(c.reloptions, ', ') || ')', '') as options,
        obj_description(c.oid, 'pg_class') as remark
      from reading join pg_class as c on c.oid = reading.view
      group by c.oid, c.relkind, c.relacl, c.relowner, c.reloptions
      order by depth
  loop
    if item.depth = 1 then
      before := before || format('drop %s %s cascade', item.kind, item.name);
    end if;
    views := views || format(
      'create %s %s%s as %s %s', item.kind, item.name, item.options, rtrim(item.definition, ';'),
      case item.kind when 'materialized view' then 'with no data' else '' end
    );
    views := views || array(select pg_get_indexdef(indexrelid) from pg_index where indrelid = item.oid)
      || array(
        select format('grant %s on %s to %s', privilege_type, item.name,
                      case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end)
          from aclexplode(item.relacl) where grantee <> item.relowner
      );
    if item.remark is not null then
      views := views || format('comment on %s %s is %L', item.kind, item.name, item.remark);
    end if;
  end loop;

  -- Rules between rows: the partitions' own are the same, and become parts of these.
  after := array(
    select format('alter table %I add constraint %I %s', p_table, conname, pg_get_constraintdef(oid))
      from pg_constraint where conrelid = old and contype = 'f' order by conname
  ) || array(
    select pg_get_indexdef(indexrelid) from pg_index where indrelid = old and not indisunique order by indexrelid
  );
  before := before || array(
    select format('alter index %s rename to %I', indexrelid::regclass, left('history_' || relname, 63))
      from pg_index join pg_class on pg_class.oid = indexrelid where indrelid = old
  );
  for item in
    select tgname, pg_get_triggerdef(oid) as definition from pg_trigger where tgrelid = old and not tgisinternal
  loop
    before := before || format('drop trigger %I on %I', item.tgname, p_table);
    views := views || item.definition;
  end loop;
  for item in
    select polname, pg_get_expr(polqual, polrelid) as readable, pg_get_expr(polwithcheck, polrelid) as writable,
        case polcmd when 'r' then 'select' when 'a' then 'insert' when 'w' then 'update' when 'd' then 'delete'
                    else 'all' end as command,
        case polpermissive when true then 'permissive' else 'restrictive' end as kind,
        (select string_agg(case role when 0 then 'public' else quote_ident(pg_get_userbyid(role)) end, ', ')
           from unnest(polroles) as role) as roles,
        obj_description(oid, 'pg_policy') as remark
      from pg_policy where polrelid = old
  loop
    before := before || format('drop policy %I on %I', item.polname, p_table);
    views := views || concat_ws(' ',
      format('create policy %I on %I as %s for %s to %s', item.polname, p_table, item.kind, item.command, item.roles),
      'using (' || item.readable || ')', 'with check (' || item.writable || ')'
    );
    if item.remark is not null then
      views := views || format('comment on policy %I on %I is %L', item.polname, p_table, item.remark);
    end if;
  end loop;
  for item in
    select privilege_type as privilege, pg_class.relowner = grantee as own,
        case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end as role
      from pg_class, aclexplode(relacl) where oid = old
  loop
    if not item.own then
      before := before || format('revoke %s on %I from %s', item.privilege, p_table, item.role);
      views := views || format('grant %s on %I to %s', item.privilege, p_table, item.role);
    end if;
  end loop;

  foreach statement in array coalesce(before, '{}') loop
    execute statement;
  end loop;
  execute format('alter table %I rename to %I', p_table, history);
  execute format('alter table %I set schema partitions', history);

  execute format(
    'create table %I (like partitions.%I including defaults including constraints including comments)
       partition by range (%I)', p_table, history, p_key
  );
  execute format('alter table %I enable row level security', p_table);
  foreach statement in array coalesce(after, '{}') loop
    execute statement;
  end loop;
  execute format(
    'create table partitions.%I (like %I including defaults including constraints, primary key (id))', rest, p_table
  );
  execute format('alter table partitions.%I enable row level security', rest);
  execute format(
    'with beyond as (delete from partitions.%1$I where %2$I is null or %2$I >= %3$L returning *)
       insert into partitions.%4$I select * from beyond', history, p_key, bound, rest
  );
  execute format(
    'alter table %I attach partition partitions.%I for values from (minvalue) to (%L)', p_table, history, bound
  );
  execute format('alter table %I attach partition partitions.%I default', p_table, rest);
  foreach statement in array coalesce(views, '{}') loop
    execute statement;
  end loop;
end
$$;

create or replace function private.fill_empty_views() returns void
language plpgsql
set search_path = public, pg_temp
as $$
declare
  view regclass;
begin
  for view in
    select oid from pg_class where relkind = 'm' and not relispopulated and relnamespace = 'private'::regnamespace
  loop
    execute format('refresh materialized view %s', view);
  end loop;
end
$$;

-- Makes the partitions up to so many months from now that are missing, and returns their names. Rows of such a month that
-- went to the default partition move. For the owner, once a month, from a scheduler.
create or replace function create_table_partitions(p_months integer default 3) returns setof text
language plpgsql
set search_path = public, pg_temp
as $$
declare
  item record;
  month timestamp;
  name text;
  there boolean;
begin
  if p_months is null or p_months not between 0 and 120 then
    raise invalid_parameter_value using message = format('%s months ahead make no sense: 0 to 120', p_months);
  end if;
  if not pg_has_role(current_user, (select relowner from pg_class where oid = 'executions'::regclass), 'usage') then
    raise insufficient_privilege using message = 'only the owner of the tables makes their partitions';
  end if;
  for item in
    select parent.relname as parent, attname as key,
        max(substring(pg_get_expr(child.relpartbound, child.oid) from 'TO \(''(.*?)''\)')::timestamp) as bound
      from pg_partitioned_table as p
        join pg_class as parent on parent.oid = p.partrelid
        join pg_attribute on attrelid = p.partrelid and attnum = p.partattrs[0]
        join pg_inherits on inhparent = p.partrelid
        join pg_class as child on child.oid = inhrelid
      where parent.relnamespace = 'public'::regnamespace
        and parent.relname in ('executions', 'matches', 'unmatched', 'audit_logs')
      group by 1, 2 order by 1
  loop
    month := item.bound;
    while month <= date_trunc('month', localtimestamp) + make_interval(months => p_months) loop
      name := item.parent || to_char(month, '"_y"YYYY"m"MM');
      execute format('lock table %I in access exclusive mode', item.parent);
      execute format(
        'create table partitions.%I (like %I including defaults including constraints, primary key (id))',
        name, item.parent
      );
      execute format('alter table partitions.%I enable row level security', name);
      execute format(
        'select exists (select from partitions.%1$I where %2$I >= %3$L and %2$I < %4$L)',
        item.parent || '_default', item.key, month, month + interval '1 month'
      ) into there;
      if there then
        -- the rows stay what they are: no trigger has anything to say
        execute format('alter table partitions.%I disable trigger user', item.parent || '_default');
        execute format(
          'with moved as (delete from partitions.%1$I where %2$I >= %3$L and %2$I < %4$L returning *)
             insert into partitions.%5$I select * from moved',
          item.parent || '_default', item.key, month, month + interval '1 month', name
        );
        execute format('alter table partitions.%I enable trigger user', item.parent || '_default');
      end if;
      execute format(
        'alter table %I attach partition partitions.%I for values from (%L) to (%L)',
        item.parent, name, month, month + interval '1 month'
      );
      return next 'partitions.' || name;
      month := month + interval '1 month';
    end loop;
  end loop;
end
$$;

-- Drops the partitions of one table that hold nothing younger than p_keep, and returns what it dropped. Nothing calls it but
-- you. An execution takes its matches, unmatched and reports along, as a DELETE does. The default partition stays.
create or replace function drop_table_partitions(p_table text, p_keep interval)
returns table (partition text, up_to timestamp, row_count bigint)
language plpgsql
set search_path = public, pg_temp
as $$
begin
  if p_keep is null or p_keep < interval '3 months' then
    raise invalid_parameter_value using
      message = format('rows younger than %s would be dropped', coalesce(p_keep::text, 'NULL')),
      hint = 'Keep 3 months at least: drop_table_partitions(''matches'', ''24 months'').';
  end if;
  if p_table is null or p_table not in ('executions', 'matches', 'unmatched', 'audit_logs') then
    raise invalid_parameter_value using
      message = format('%L is not partitioned by month', p_table),
      hint = 'Known: executions, matches, unmatched, audit_logs.';
  end if;
  if not pg_has_role(current_user, (select relowner from pg_class where oid = p_table::regclass), 'usage') then
    raise insufficient_privilege using message = format('only the owner of %s drops its partitions', p_table);
  end if;
  for partition, up_to in
    select inhrelid::regclass::text, substring(pg_get_expr(relpartbound, oid) from 'TO \(''(.*?)''\)')::timestamp as bound
      from pg_inherits join pg_class on oid = inhrelid
      where inhparent = p_table::regclass
        and substring(pg_get_expr(relpartbound, oid) from 'TO \(''(.*?)''\)')::timestamp <= localtimestamp - p_keep
      order by bound
  loop
    execute format('lock table %I in access exclusive mode', p_table);
    execute format('select count(*) from %s', partition) into row_count;
    if p_table = 'executions' then
      execute format('delete from private.execution_ids where id in (select id from %s)', partition);
    end if;
    execute format('drop table %s', partition);
    return next;
  end loop;
end
$$;

create or replace trigger keep_execution_ids after insert or delete or update of id, tenant_id on executions
  for each row execute function private.keep_execution_ids();
create or replace trigger keep_executions before truncate on executions
  for each statement execute function private.keep_execution_ids();
