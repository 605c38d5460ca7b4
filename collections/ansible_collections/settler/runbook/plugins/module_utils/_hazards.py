# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hazards: what the pending files mean in this database, where the sizes are known."""

from __future__ import annotations

import contextlib
import json
import re
import typing as t
from dataclasses import asdict, dataclass, replace

from ansible_collections.settler.runbook.plugins.module_utils._connection import reset, set_role
from ansible_collections.settler.runbook.plugins.module_utils._effects import (
    CHECKED,
    DROPPED,
    LOCKS,
    MADE,
    RENAMED,
    SHARE_ROW_EXCLUSIVE,
    VALIDATED,
    quoted,
    schema_of,
    stronger,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import BATCH
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._reach import reached
from ansible_collections.settler.runbook.plugins.module_utils._risks import (
    DEFAULT_PARTITION,
    OF_SCHEMA,
    RULES,
    Risk,
)
from ansible_collections.settler.runbook.plugins.module_utils._run import one_of, rows_of

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._effects import Effect
    from ansible_collections.settler.runbook.plugins.module_utils._run import Options
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Script, Statement

_SEARCH_PATH = re.compile(
    r"(re)?set\s+((session|local)\s+)?(search_path|schema)\b"
    r"|select\s+(pg_catalog\.)?set_config\(\s*'search_path'\s*,\s*'[^']*'\s*,\s*(true|false)\s*\)\s*;?\s*$",
    re.IGNORECASE,
)

#: Allows every hazard.
ALL = "all"

_RELATIONS = """
SELECT wanted.name, c.oid::bigint AS oid, n.nspname AS schema, c.relname AS own_name,
       c.relkind IN ('r', 'p', 'm', 'i', 'I') AS has_rows,
       (SELECT indrelid::regclass::text FROM pg_catalog.pg_index WHERE indexrelid = c.oid) AS index_of,
       ARRAY(SELECT DISTINCT confrelid::regclass::text FROM pg_catalog.pg_constraint
             WHERE conrelid = c.oid AND contype = 'f' AND confrelid <> c.oid ORDER BY 1) AS refers_to,
       coalesce((SELECT sum({size}) FROM pg_catalog.pg_partition_tree(c.oid) p
                 JOIN pg_catalog.pg_class leaf ON leaf.oid = p.relid WHERE p.isleaf), {own_size})::bigint AS bytes,
       coalesce((SELECT sum(greatest(leaf.reltuples, 0)) FROM pg_catalog.pg_partition_tree(c.oid) p
                 JOIN pg_catalog.pg_class leaf ON leaf.oid = p.relid WHERE p.isleaf),
                nullif(c.reltuples, -1))::bigint AS rows
FROM unnest(%s::text[]) AS wanted (name)
JOIN pg_catalog.pg_class c ON c.oid = to_regclass(wanted.name)
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
"""
#: Rows and what is stored beside them; without indexes and maps, so that an empty table has none.
_EXACT = {
    "size": "pg_relation_size(leaf.oid) + coalesce(pg_relation_size(nullif(leaf.reltoastrelid, 0)), 0)",
    "own_size": "pg_relation_size(c.oid) + coalesce(pg_relation_size(nullif(c.reltoastrelid, 0)), 0)",
}
_ESTIMATED = {
    "size": "leaf.relpages::bigint * current_setting('block_size')::int",
    "own_size": "c.relpages::bigint * current_setting('block_size')::int",
}

_COLUMN = """
SELECT attnotnull AS not_null, atttypid::bigint AS type, atttypmod AS modifier, EXISTS (
         SELECT FROM pg_catalog.pg_constraint k
         WHERE k.conrelid = a.attrelid AND k.contype = 'c' AND k.convalidated AND k.conkey = ARRAY[a.attnum]
           AND pg_get_constraintdef(k.oid) = format('CHECK ((%%I IS NOT NULL))', a.attname)) AS proved
FROM pg_catalog.pg_attribute a WHERE attrelid = %s::oid AND attname = %s AND attnum > 0 AND NOT attisdropped
"""
_VOLATILE = """
SELECT EXISTS (SELECT FROM unnest(%s::text[]) AS wanted (name)
               LEFT JOIN pg_catalog.pg_proc p ON p.proname = wanted.name
               WHERE p.oid IS NULL OR p.provolatile = 'v')
"""
_NO_REWRITE = """
SELECT (%(old)s::oid = %(new)s::oid
         AND (%(new_modifier)s = -1 OR %(old_modifier)s = %(new_modifier)s OR (
           %(old)s::oid IN ('varchar'::regtype, 'varbit'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype,
                            'time'::regtype, 'timetz'::regtype)
           AND %(old_modifier)s BETWEEN 0 AND %(new_modifier)s) OR (
           %(old)s::oid = 'numeric'::regtype AND %(old_modifier)s BETWEEN 0 AND %(new_modifier)s
           AND (%(old_modifier)s - 4) & 65535 = (%(new_modifier)s - 4) & 65535))
    OR %(new_modifier)s = -1 AND EXISTS (
         SELECT FROM pg_catalog.pg_cast
         WHERE castsource = %(old)s::oid AND casttarget = %(new)s::oid AND castmethod = 'b')
    OR %(old)s::oid = 'text'::regtype AND %(new)s::oid = 'varchar'::regtype AND %(new_modifier)s = -1) AS kept
"""
#: Of a domain, and of those that it is made of: writing it into the rows is how the server checks them.
_CONSTRAINED = """
WITH RECURSIVE types AS (
    SELECT oid, typtype, typbasetype, typnotnull FROM pg_catalog.pg_type WHERE oid = to_regtype(%s)
    UNION ALL
    SELECT p.oid, p.typtype, p.typbasetype, p.typnotnull FROM pg_catalog.pg_type p JOIN types t ON p.oid = t.typbasetype
)
SELECT EXISTS (SELECT FROM types t WHERE typtype = 'd' AND (typnotnull OR EXISTS (
    SELECT FROM pg_catalog.pg_constraint WHERE contypid = t.oid AND contype = 'c')))
"""
#: Whether a constraint that is validated, in the database or by the run, is one on the partition key, in both
#: directions; or the run has made one itself. What it says, the server compares.
_FITTING = """
WITH key AS (
    SELECT p.partstrat, p.partdefid, array_agg(a.attnum) AS columns, bool_and(a.attnotnull) AS not_null
    FROM pg_catalog.pg_partitioned_table p, unnest(p.partattrs::int2[]) AS number
    JOIN pg_catalog.pg_attribute of ON of.attnum = number
    JOIN pg_catalog.pg_attribute a ON a.attname = of.attname AND a.attrelid = %(part)s::oid
    WHERE p.partrelid = %(of)s::oid AND of.attrelid = p.partrelid GROUP BY 1, 2
)
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_constraint k, key, pg_get_constraintdef(k.oid) AS said
    WHERE k.conrelid = %(part)s::oid AND k.contype = 'c' AND k.conkey @> key.columns
      AND (k.convalidated OR k.conname = ANY (%(validated)s::text[]))
      AND CASE WHEN key.partdefid = k.conrelid OR key.partstrat <> 'r' THEN true
               ELSE said LIKE '%%>=%%' AND said LIKE '%%<%%' AND (key.not_null OR said LIKE '%%IS NOT NULL%%') END)
    OR EXISTS (
    SELECT FROM unnest(%(validated)s::text[]) AS made (name)
    WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conrelid = %(part)s::oid AND conname = made.name)
) AS fits
"""


@dataclass(frozen=True)
class Relation:
    """A relation that is in the database now: its size in bytes and the planner's estimate of its rows, if any.

    C(has_rows) tells tables, materialized views and indexes from all others. C(index_of) is the table of an index,
    C(refers_to) has the tables that the foreign keys of a table refer to.
    """

    name: str
    oid: int
    schema: str
    own_name: str
    has_rows: bool
    index_of: str | None
    refers_to: tuple[str, ...]
    bytes: int
    rows: int | None

    @property
    def key(self) -> str:
        """The name with its schema."""
        return quoted(self.schema, self.own_name)

    def __str__(self) -> str:
        return f"{self.name} ({_extent(self.bytes, self.rows)})"

    def as_dict(self) -> dict[str, t.Any]:
        """Return what a result tells of it."""
        return {"relation": self.name, "bytes": self.bytes, "rows": self.rows}


@dataclass(frozen=True)
class Hazard:
    """What is dangerous at a line of a file; C(allowed) says who allows it and why, and is empty if nobody does."""

    hazard: str
    file: str
    line: int
    relation: str
    bytes: int
    rows: int | None
    meaning: str
    instead: str
    allowed: str = ""


@dataclass(frozen=True)
class FilePlan:
    """What a pending file would do in this database.

    C(lock) is the strongest lock C(on) a relation that is there already, C(code) has the lines of DO and CALL: what
    they do, nobody can tell beforehand. C(advice) has lines of a linter.
    """

    file: str
    version: str
    checksum: str
    kind: str
    transactional: bool
    statements: int
    irreversible: bool
    lock: str = ""
    on: Relation | None = None
    hazards: tuple[Hazard, ...] = ()
    code: tuple[int, ...] = ()
    advice: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, t.Any]:
        """Return the plan for a module's result."""
        told = asdict(self)
        del told["on"]
        return {
            **told,
            "lock": self.on and {"mode": self.lock, **self.on.as_dict()},
            "hazards": list(told["hazards"]),
            "code": list(self.code),
            "advice": list(self.advice),
            "changes": list(self.changes),
            "text": self.lines(),
        }

    def as_text(self) -> str:
        """Return the plan for C(--diff)."""
        return "".join([f"{self.file}\n", *(f"    {line}\n" for line in self.lines())])

    def lines(self) -> list[str]:
        """Return what an operator should know, a line each."""
        how = "one transaction" if self.transactional else "no transaction" if self.kind != BATCH else "batches"
        facts = [f"{how}, {self.statements} statement{'s' * (self.statements != 1)}"]
        if self.on:
            facts.append(f"{self.lock} on {self.on}")
        if self.code:
            facts.append(f"code that a plan cannot look into at line{'s' * (len(self.code) > 1)} {_lines(self.code)}")
        if self.irreversible:
            facts.append("irreversible: the way back is a restore")
        return (
            ["; ".join(facts)]
            + [
                f"{one.hazard} at line {one.line}: {one.relation}"
                + (f" (allowed: {one.allowed})" if one.allowed else "")
                for one in self.hazards
            ]
            + list(self.advice)
        )


def size(count: int) -> str:
    """Return a number of bytes as a person reads it."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1024 or unit == "TB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 10 or unit == "bytes" else f"{value:.1f} {unit}"


def _lines(lines: t.Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:5]))
    return shown + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")


def refuse_hazards(plans: t.Sequence[FilePlan]) -> None:
    """Raise if a hazard is allowed neither by its file nor by the run."""
    found = [hazard for plan in plans for hazard in plan.hazards if not hazard.allowed]
    if not found:
        return
    names = sorted({hazard.hazard for hazard in found})
    once = json.dumps({"migrate_hazards_allowed": names})
    raise RunbookError(
        "the plan has hazards that nobody allows; nothing was applied\n"
        + "\n".join(
            f"  {one.file}:{one.line}: {one.hazard}: {one.relation} ({_extent(one.bytes, one.rows)})\n"
            f"    {one.meaning}\n    instead: {one.instead}"
            for one in found
        ),
        hint=f'Where it is meant: -- runbook: allow={names[0]} reason="…" at the head of the file, '
        f"or for this run -e '{once}'.",
        hazards=[asdict(one) for one in found],
    )


def _extent(count: int, rows: int | None) -> str:
    return size(count) + ("" if rows is None else f", about {rows:,} rows")


def assess(
    connection: psycopg.Connection[t.Any] | None, scripts: t.Sequence[Script], options: Options
) -> tuple[FilePlan, ...]:
    """Return what the pending files would do, in order.

    Args:
        connection: a session that works as C(options.role); None where there is no database: nothing is there yet.
        scripts: the pending files.
        options: C(hazards_allowed) and C(hazard_min_bytes) count.

    Raises:
        RunbookError: a policy or a file allows a hazard that does not exist.
    """
    refuse_unknown((name, "migrate_hazards_allowed") for name in options.hazards_allowed)
    refuse_unknown((name, f"{script.file.path}:1") for script in scripts for name, _reason in script.allows)
    assessment = _Assessment(connection, scripts, options)
    return tuple(assessment.plan_of(script) for script in scripts)


def refuse_unknown(named: t.Iterable[tuple[str, str]]) -> None:
    """Raise if a name is none of a hazard; the second of each pair says where it stands."""
    for name, where in named:
        if name not in RULES and name != ALL:
            raise RunbookError(
                f"{where}: unknown hazard {name}", hint=f"Known are: {', '.join(sorted(RULES))}, and {ALL}."
            )


class _Assessment:
    """Walks through the files of a run and keeps in mind what they have made of the relations so far."""

    def __init__(
        self, connection: psycopg.Connection[t.Any] | None, scripts: t.Sequence[Script], options: Options
    ) -> None:
        self._connection = connection
        self._options = options
        #: What a name with its schema stands for by now: the one that it has in the database, or None if the run
        #: made it.
        self._names: dict[str, str | None] = {}
        self._path = ""  # the SET that the file at hand has given; each file begins without one
        self._checks: dict[tuple[str, str], str] = {}
        self._proved: set[tuple[str, str]] = set()
        self._validated: dict[str, set[str]] = {}
        self._by_key: dict[str, Relation] = {}
        #: By the SET under which they were looked for: the schema where new ones go, and what was found, or not.
        self._found: dict[str, tuple[str, dict[str, Relation | None]]] = {}
        self._wanted = {effect.relation for script in scripts for one in script.statements for effect in one.effects}
        self._learn(self._wanted)

    def plan_of(self, script: Script) -> FilePlan:
        """Return the plan of the next file."""
        held: dict[Relation, str] = {}
        hazards: list[Hazard] = []
        self._path = ""
        for statement in script.statements:
            if _SEARCH_PATH.match(statement.text):
                self._path = statement.text
                self._learn(self._wanted)
            hazards += self._hazards(script, statement, held)
            for effect in statement.effects:
                for locked in self._locked(effect):
                    held[locked] = stronger(held.get(locked, ""), effect.lock)
            self._follow(statement)
        relation = max(held, key=lambda one: (LOCKS.index(held[one]), not one.index_of, one.bytes), default=None)
        lock = held[relation] if relation else ""
        return FilePlan(
            script.file.file,
            script.file.version,
            script.file.checksum,
            script.file.kind,
            script.transactional,
            len(script.statements),
            script.file.directives.irreversible,
            lock,
            relation,
            hazards=tuple(hazards),
            code=tuple(one.line for one in script.statements if one.commits),
            changes=script.file.directives.changes,
        )

    def _learn(self, names: t.Collection[str]) -> None:
        """Look for relations of the database under the present search_path."""
        schema, known = self._found.get(self._path, ("", {}))
        if unknown := set(names) - known.keys():
            schema, found = _relations(self._connection, unknown, self._path)
            known = known | dict.fromkeys(unknown) | found
            for relation in found.values():
                self._by_key.setdefault(relation.key, relation)
        self._found[self._path] = schema, known

    def _key(self, name: str) -> str:
        """Return the name with its schema that a name of the file at hand stands for."""
        if schema_of(name):
            return name
        schema, known = self._found[self._path]
        found, made = known.get(name), f"{schema}.{name}"
        return found.key if found and made not in self._names else made

    def _now(self, name: str) -> Relation | None:
        """Return the relation of the database that a name of the files stands for at this point."""
        key = self._key(name)
        known = self._names.get(key, key)
        return self._by_key.get(known) if known else None

    def _locked(self, effect: Effect) -> list[Relation]:
        """Return what an effect locks: the relation, and what the server locks along with it."""
        relation = self._now(effect.relation)
        if not relation or not effect.lock:
            return []
        along: t.Sequence[str] = ()
        if effect.change == DROPPED:
            along = [relation.index_of] if relation.index_of else relation.refers_to
        self._learn(along)
        return [one for one in (relation, *map(self._now, along)) if one]

    def _follow(self, statement: Statement) -> None:
        """Keep in mind what a statement makes of its relations."""
        for effect in statement.effects:
            key = self._key(effect.relation)
            if effect.change == MADE:
                key = key if schema_of(effect.relation) else f"{self._found[self._path][0]}.{effect.relation}"
                if self._names.get(key, key) not in self._by_key:
                    self._names[key] = None
            elif effect.change == DROPPED:
                self._names[key] = None
            elif effect.change == RENAMED:
                new = effect.name if schema_of(effect.name) else f"{schema_of(key)}.{effect.name}"
                self._names[new], self._names[key] = self._names.get(key, key), None
            elif effect.change == CHECKED:
                self._checks[key, effect.name] = effect.column
            elif effect.change == VALIDATED:
                self._validated.setdefault(key, set()).add(effect.name)
                if (key, effect.name) in self._checks:
                    self._proved.add((key, self._checks[key, effect.name]))

    def _hazards(self, script: Script, statement: Statement, held: t.Mapping[Relation, str]) -> t.Iterator[Hazard]:
        """Yield the hazards of a statement."""
        for risk in (*statement.risks, *self._validations(script, statement, held)):
            for one in self._expanded(risk):
                relation = self._now(one.relation)
                if relation and self._is_hazard(one, relation, script):
                    rule = RULES[one.hazard]
                    yield Hazard(
                        one.hazard,
                        str(script.file.path),
                        statement.line,
                        relation.name + (f".{one.column}" if one.column else ""),
                        relation.bytes,
                        relation.rows,
                        rule.meaning,
                        rule.instead,
                        self._allowed(script, one.hazard),
                    )

    def _allowed(self, script: Script, hazard: str) -> str:
        """Return who allows a hazard, and why."""
        reason = next((reason for name, reason in script.allows if name in (hazard, ALL)), "")
        run = {hazard, ALL} & set(self._options.hazards_allowed)
        return reason or ("migrate_hazards_allowed" if run else "")

    def _validations(self, script: Script, statement: Statement, held: t.Mapping[Relation, str]) -> t.Iterator[Risk]:
        """Yield a risk for VALIDATE CONSTRAINT after a statement of the same transaction that keeps writers out."""
        for effect in statement.effects if script.transactional else ():
            relation = self._now(effect.relation)
            lock = held.get(relation, "") if relation else ""
            if effect.change == VALIDATED and lock and LOCKS.index(lock) >= LOCKS.index(SHARE_ROW_EXCLUSIVE):
                yield Risk("validate-under-lock", effect.relation)

    def _expanded(self, risk: Risk) -> t.Iterator[Risk]:
        """Yield a risk for each relation that is meant, where it names none itself."""
        if not risk.reach:
            yield risk
            return
        name = risk.relation
        if risk.reach == DEFAULT_PARTITION:
            parent = self._now(name)
            if not parent:
                return
            name = parent.key
        for table, column in self._reached(risk.reach, name):
            self._learn([table])
            hazard = "drop-column" if column and risk.hazard == "drop-table" else risk.hazard
            of = name if risk.reach == DEFAULT_PARTITION else ""
            yield replace(risk, hazard=hazard, relation=table, column=column, partition_of=of, reach="")
        if risk.reach == OF_SCHEMA:  # what the run has moved there
            moved = [key for key, known in self._names.items() if known and key.startswith(f"{name}.")]
            yield from (replace(risk, relation=key, reach="") for key in moved)

    def _reached(self, reach: str, name: str) -> list[tuple[str, str]]:
        """Return the tables and columns that a statement reaches, by the search_path of its file."""
        if not self._connection:
            return []
        with _under(self._connection, self._path):
            return reached(self._connection, reach, name)

    def _is_hazard(self, risk: Risk, relation: Relation, script: Script) -> bool:
        """Tell whether a risk is a hazard here."""
        rule = RULES[risk.hazard]
        least = 1 if rule.loses_data else max(1, self._options.hazard_min_bytes)
        if rule.needs_rows and (not relation.has_rows or relation.bytes < least):
            return False
        assert self._connection
        if risk.partition_of and self._fits(risk, relation):
            return False
        if risk.domain and not self._is_constrained(risk.domain):
            return False
        if risk.hazard == "row-security-hides-rows":
            return relation.has_rows and _hides_rows(self._connection, relation, script, self._options)
        if risk.index:
            name = risk.index if schema_of(risk.index) else f"{quoted(relation.schema)}.{risk.index}"
            if one_of(self._connection, "SELECT to_regclass(%s) IS NOT NULL", name):
                return False
        return self._concerns_column(risk, relation)

    def _fits(self, risk: Risk, relation: Relation) -> bool:
        """Tell whether a constraint lets the server take a partition without reading it."""
        assert self._connection
        parent = self._now(risk.partition_of)
        validated = sorted(self._validated.get(self._key(risk.relation), ()))
        about = {"part": relation.oid, "of": parent.oid if parent else None, "validated": validated}
        return bool(rows_of(self._connection, _FITTING, about)[0]["fits"])

    def _is_constrained(self, domain: str) -> bool:
        """Tell whether a type of the database is a domain whose constraints each row must be compared with."""
        assert self._connection
        with _under(self._connection, self._path):
            return bool(one_of(self._connection, _CONSTRAINED, domain))

    def _concerns_column(self, risk: Risk, relation: Relation) -> bool:
        """Tell whether a risk stands, by what the catalogue says of the column that it names."""
        assert self._connection
        if risk.functions is not None and not one_of(self._connection, _VOLATILE, list(risk.functions)):
            return False
        if not risk.column:
            return True
        found = rows_of(self._connection, _COLUMN, [relation.oid, risk.column])
        if not found or risk.absent:
            return bool(risk.absent and not found)
        column = found[0]
        if risk.hazard == "not-null-without-check":
            return not (
                column["not_null"] or column["proved"] or (self._key(risk.relation), risk.column) in self._proved
            )
        return not risk.type or not _keeps_rows(self._connection, column, risk.type)


@contextlib.contextmanager
def _under(connection: psycopg.Connection[t.Any], path: str) -> t.Iterator[None]:
    """Work in a transaction that is rolled back, under the SET search_path that a file has given, if any."""
    with connection.transaction(force_rollback=True):
        if path:
            connection.execute(path.encode())
        yield


def _relations(
    connection: psycopg.Connection[t.Any] | None, names: t.Collection[str], path: str
) -> tuple[str, dict[str, Relation]]:
    """Return the schema where new relations go, and those of the database that bear these names.

    Sizes are estimates where a lock is held. C(path) is a file's own SET search_path, under which it names them.
    """
    if connection is None:
        return "", {}
    wanted = [sorted(names)]
    with _under(connection, path):
        connection.execute("SELECT set_config('lock_timeout', '1s', true)")
        schema = quoted(one_of(connection, "SELECT current_schema()::text"))
        try:
            with connection.transaction():
                rows = rows_of(connection, _RELATIONS.format(**_EXACT), wanted)
        except psycopg.errors.LockNotAvailable:
            rows = rows_of(connection, _RELATIONS.format(**_ESTIMATED), wanted)
    return schema, {row["name"]: Relation(**{**row, "refers_to": tuple(row["refers_to"])}) for row in rows}


def _hides_rows(connection: psycopg.Connection[t.Any], relation: Relation, script: Script, options: Options) -> bool:
    """Tell whether row security limits what the file's role sees of a relation."""
    role = script.file.directives.role
    if role:
        reset(connection)
        set_role(connection, role)
    try:
        return bool(one_of(connection, "SELECT row_security_active(%s::oid)", relation.oid))
    finally:
        if role:
            reset(connection)
            set_role(connection, options.role)


def _keeps_rows(connection: psycopg.Connection[t.Any], column: t.Mapping[str, t.Any], wanted: str) -> bool:
    """Tell whether a column takes a type without a row being written anew."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("SELECT NULL::{}").format(sql.SQL(wanted)))
            assert cursor.pgresult
            new, modifier = cursor.pgresult.ftype(0), cursor.pgresult.fmod(0)
    except psycopg.Error:  # a type that the run makes
        return False
    return bool(
        rows_of(
            connection,
            _NO_REWRITE,
            {"old": column["type"], "old_modifier": column["modifier"], "new": new, "new_modifier": modifier},
        )[0]["kept"]
    )
