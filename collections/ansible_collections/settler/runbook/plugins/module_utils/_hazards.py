# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hazards: what the pending files mean in this database, where the sizes are known."""

from __future__ import annotations

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
    stronger,
)
from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._files import BATCH
from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg, sql
from ansible_collections.settler.runbook.plugins.module_utils._risks import RULES, Risk
from ansible_collections.settler.runbook.plugins.module_utils._run import one_of, rows_of

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._run import Options
    from ansible_collections.settler.runbook.plugins.module_utils._statements import Script, Statement

_SEARCH_PATH = re.compile(r"(re)?set\s+((session|local)\s+)?(search_path|schema)\b", re.IGNORECASE)

#: Allows every hazard.
ALL = "all"

_RELATIONS = """
SELECT wanted.name, c.oid::bigint AS oid, n.nspname AS schema, c.relkind IN ('r', 'p', 'm') AS has_rows,
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
_TABLES_OF_SCHEMA = """
SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relkind IN ('r', 'p') ORDER BY 1
"""


@dataclass(frozen=True)
class Relation:
    """A relation that is in the database now: its size in bytes and the planner's estimate of its rows, if any.

    C(has_rows) tells tables and materialized views from all others.
    """

    name: str
    oid: int
    schema: str
    has_rows: bool
    bytes: int
    rows: int | None

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
        #: What a name stands for by now, under a search_path: the name that the relation has in the database, or None
        #: if the run made it.
        self._names: dict[tuple[str, str], str | None] = {}
        self._path = ""  # the SET that the file at hand has given; each file begins without one
        self._checks: dict[tuple[str, str], str] = {}
        self._proved: set[tuple[str, str]] = set()
        effects = [effect for script in scripts for one in script.statements for effect in one.effects]
        self._wanted = {effect.relation for effect in effects}
        #: By the SET under which they were looked for.
        self._found = {"": _relations(connection, self._wanted)}

    def plan_of(self, script: Script) -> FilePlan:
        """Return the plan of the next file."""
        held: dict[Relation, str] = {}
        hazards: list[Hazard] = []
        self._path = ""
        for statement in script.statements:
            if statement.session and _SEARCH_PATH.match(statement.text):
                self._path = statement.text
            hazards += self._hazards(script, statement, held)
            for effect in statement.effects:
                relation = self._now(effect.relation)
                if effect.lock and relation:
                    held[relation] = stronger(held.get(relation, ""), effect.lock)
            self._follow(statement)
        relation = max(held, key=lambda one: (LOCKS.index(held[one]), one.bytes), default=None)
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

    @property
    def _relations(self) -> dict[str, Relation]:
        """The relations of the database by their names under the present search_path."""
        if self._path not in self._found:
            self._found[self._path] = _relations(self._connection, self._wanted, self._path)
        return self._found[self._path]

    def _key(self, name: str) -> tuple[str, str]:
        return ("" if "." in name else self._path), name

    def _now(self, name: str) -> Relation | None:
        """Return the relation of the database that a name of the files stands for at this point."""
        known = self._names.get(self._key(name), name)
        return self._relations.get(known) if known else None

    def _follow(self, statement: Statement) -> None:
        """Keep in mind what a statement makes of its relations."""
        for effect in statement.effects:
            key = self._key(effect.relation)
            if effect.change == DROPPED or (effect.change == MADE and self._now(effect.relation) is None):
                self._names[key] = None
            elif effect.change == RENAMED:
                self._names[self._key(effect.name)], self._names[key] = self._names.get(key, effect.relation), None
            elif effect.change == CHECKED:
                self._checks[effect.relation, effect.name] = effect.column
            elif effect.change == VALIDATED and (effect.relation, effect.name) in self._checks:
                self._proved.add((effect.relation, self._checks[effect.relation, effect.name]))

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
        """Yield a risk for each table of a schema, where it is one of a schema."""
        if not risk.schema:
            yield risk
        elif self._connection:
            tables = [row[0] for row in self._connection.execute(_TABLES_OF_SCHEMA, [risk.schema])]
            self._relations.update(_relations(self._connection, set(tables)))
            for table in tables:
                yield replace(risk, relation=table, schema="")

    def _is_hazard(self, risk: Risk, relation: Relation, script: Script) -> bool:
        """Tell whether a risk is a hazard here."""
        rule = RULES[risk.hazard]
        least = 1 if rule.loses_data else max(1, self._options.hazard_min_bytes)
        if rule.needs_rows and (not relation.has_rows or relation.bytes < least):
            return False
        assert self._connection
        if risk.hazard == "row-security-hides-rows":
            return relation.has_rows and _hides_rows(self._connection, relation, script, self._options)
        if risk.index:
            name = risk.index if "." in risk.index else f'"{relation.schema}".{risk.index}'
            if one_of(self._connection, "SELECT to_regclass(%s) IS NOT NULL", name):
                return False
        return self._concerns_column(risk, relation)

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
            return not (column["not_null"] or column["proved"] or (risk.relation, risk.column) in self._proved)
        return not risk.type or not _keeps_rows(self._connection, column, risk.type)


def _relations(
    connection: psycopg.Connection[t.Any] | None, names: t.Collection[str], path: str = ""
) -> dict[str, Relation]:
    """Return those relations of the database that bear these names; sizes are estimates where a lock is held.

    C(path) is a file's own SET search_path, under which it names them.
    """
    if connection is None or not names:
        return {}
    wanted = [sorted(names)]
    with connection.transaction(force_rollback=True):
        if path:
            connection.execute(path.encode())
        connection.execute("SELECT set_config('lock_timeout', '1s', true)")
        try:
            with connection.transaction():
                rows = rows_of(connection, _RELATIONS.format(**_EXACT), wanted)
        except psycopg.errors.LockNotAvailable:
            rows = rows_of(connection, _RELATIONS.format(**_ESTIMATED), wanted)
    return {row["name"]: Relation(**row) for row in rows}


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
