# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Verification: the catalogue against an expectation, and the health that a catalogue comparison does not show."""

from __future__ import annotations

import datetime as dt
import fnmatch
import json
import re
import typing as t
from dataclasses import asdict, dataclass, replace
from xml.etree import ElementTree as ET  # written, never read

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._catalog import Snapshot
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

#: Kinds of a snapshot in the order in which an operator wants to read their differences.
KINDS = {
    "extensions": "extension",
    "schemas": "schema",
    "types": "type",
    "tables": "table",
    "sequences": "sequence",
    "functions": "function",
    "views": "view",
    "materialized_views": "materialized view",
    "default_privileges": "default privileges",
    "others": "object",
}
_PARTS = {
    "columns": "column",
    "constraints": "constraint",
    "indexes": "index",
    "policies": "policy",
    "triggers": "trigger",
    "rules": "rule",
    "statistics": "statistics",
    "grants": "grant",
    "column_grants": "column grant",
}
#: Parts that open what is there or change what it does: a stray one is no drift that may wait.
_OPENING = frozenset({"grants", "column_grants", "policies", "triggers", "rules"})


class _Health(t.NamedTuple):
    """A look for objects that are there but do not work: C(query) returns their names and what is wrong.

    C(since) is the server_version_num of the first PostgreSQL that can answer.
    """

    check: str
    query: t.LiteralString
    expected: str
    hint: str
    since: int = 0


_HEALTH = (
    _Health(
        "index valid",
        """
        SELECT i.indexrelid::regclass::text, concat_ws(', ', CASE WHEN NOT i.indisvalid THEN 'invalid' END,
            CASE WHEN NOT i.indisready THEN 'not ready' END, CASE WHEN NOT i.indislive THEN 'not live' END)
        FROM pg_catalog.pg_index i
        WHERE i.indexrelid >= 16384 AND NOT (i.indisvalid AND i.indisready AND i.indislive)
        """,
        "valid and ready",
        "A concurrent build failed: REINDEX INDEX CONCURRENTLY, or drop it and build it again.",
    ),
    _Health(
        "no leftover of a rebuild",
        r"""
        SELECT c.oid::regclass::text, 'a REINDEX or CREATE INDEX CONCURRENTLY was broken off'
        FROM pg_catalog.pg_class c WHERE c.relkind IN ('i', 'I') AND c.relname ~ '_cc(new|old)\d*$'
        """,
        "none",
        "DROP INDEX; if the name ends in _ccnew, then REINDEX INDEX CONCURRENTLY the one that it was to replace.",
    ),
    _Health(
        "materialized view filled",
        """
        SELECT c.oid::regclass::text, 'never filled, cannot be read' FROM pg_catalog.pg_class c
        WHERE c.relkind = 'm' AND NOT c.relispopulated
        """,
        "filled",
        "REFRESH MATERIALIZED VIEW, without CONCURRENTLY the first time.",
    ),
    _Health(
        "constraint validated",
        """
        SELECT coalesce(nullif(conrelid, 0)::regclass::text, contypid::regtype::text) || '.' || conname, 'not validated'
        FROM pg_catalog.pg_constraint WHERE NOT convalidated AND oid >= 16384
        """,
        "validated",
        "ALTER TABLE … VALIDATE CONSTRAINT, after the rows that break it were repaired.",
    ),
    _Health(
        "partition attached",
        "SELECT inhrelid::regclass::text, 'detach pending' FROM pg_catalog.pg_inherits WHERE inhdetachpending",
        "attached or detached",
        "ALTER TABLE … DETACH PARTITION … FINALIZE.",
    ),
    _Health(
        "trigger enabled",
        """
        SELECT tgrelid::regclass::text || '.' || tgname,
            CASE tgenabled WHEN 'D' THEN 'disabled' ELSE 'enabled ' || tgenabled::text END
        FROM pg_catalog.pg_trigger WHERE tgenabled <> 'O' AND oid >= 16384
        """,
        "enabled",
        "ALTER TABLE … ENABLE TRIGGER; a disabled foreign key trigger lets orphans in.",
    ),
    _Health(
        "collation version",
        """
        SELECT quote_ident(n.nspname) || '.' || quote_ident(c.collname), 'made with version ' || c.collversion
        FROM pg_catalog.pg_collation c JOIN pg_catalog.pg_namespace n ON n.oid = c.collnamespace
        WHERE c.collversion IS DISTINCT FROM pg_collation_actual_version(c.oid) AND c.collversion IS NOT NULL
          AND (c.oid >= 16384 OR EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.refobjid = c.oid
                                         AND d.refclassid = 'pg_catalog.pg_collation'::regclass))
        """,
        "that of the operating system",
        "Indexes on text may be in a wrong order: REINDEX, then ALTER … REFRESH COLLATION VERSION.",
    ),
    _Health(
        "collation version of the database",
        """
        SELECT quote_ident(datname), 'made with version ' || datcollversion FROM pg_catalog.pg_database
        WHERE datname = current_database() AND datcollversion <> pg_database_collation_actual_version(oid)
        """,
        "that of its provider",
        "Indexes on text may be in a wrong order: REINDEX DATABASE, then ALTER DATABASE … REFRESH COLLATION VERSION.",
        since=150000,
    ),
)

#: What no dump of one database carries: its owner, what everybody may do with it, whether the application may connect.
_DATABASE = """
SELECT d.datname, pg_get_userbyid(d.datdba),
    (SELECT string_agg(privilege_type, ', ' ORDER BY privilege_type)
     FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) WHERE grantee = 0),
    (SELECT concat_ws(', ',
        CASE WHEN NOT has_database_privilege(r.oid, d.oid, 'CONNECT') THEN 'may not connect' END,
        CASE WHEN NOT r.rolcanlogin THEN 'NOLOGIN' END,
        CASE WHEN 0 IN (r.rolconnlimit, d.datconnlimit) THEN 'CONNECTION LIMIT 0' END)
     FROM pg_catalog.pg_roles r WHERE r.rolname = %s)
FROM pg_catalog.pg_database d WHERE d.datname = current_database()
"""

#: Rights on the database by grantee, but for the owner's and everybody's.
_DATABASE_GRANTS = """
SELECT pg_get_userbyid(a.grantee), string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type),
    bool_or(a.privilege_type = 'CREATE' OR a.is_grantable)
FROM pg_catalog.pg_database d, aclexplode(d.datacl) a
WHERE d.datname = current_database() AND a.grantee NOT IN (0, d.datdba) GROUP BY 1 ORDER BY 1
"""

#: Settings of the database and of roles that take the effect of keys, triggers or policies away, or change whose
#: rights hold and what a query means.
_SETTINGS = """
SELECT concat_ws(' in ', 'role ' || quote_ident(r.rolname), 'database ' || quote_ident(d.datname)), c.entry
FROM pg_catalog.pg_db_role_setting s CROSS JOIN LATERAL unnest(s.setconfig) c (entry)
LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
WHERE (s.setdatabase = 0 OR d.datname = current_database()) AND (s.setrole = 0 OR r.rolname = ANY (%s))
  AND (split_part(c.entry, '=', 1) IN ('role', 'session_authorization', 'ignore_system_indexes', 'zero_damaged_pages',
                                       'transform_null_equals', 'standard_conforming_strings')
       OR c.entry ~ '^session_replication_role=(?!origin)' OR c.entry ~* '^row_security=(off|false|no|0)')
ORDER BY 1, 2
"""

#: Sequences that a column owns, and those that its default draws from without owning them. A role that policies bind
#: sees no edge of the whole table.
_SEQUENCES = """
SELECT DISTINCT s.oid::regclass::text, t.oid::regclass::text, quote_ident(a.attname), p.seqincrement,
    has_table_privilege(t.oid, 'SELECT') AND has_sequence_privilege(s.oid, 'SELECT') AND NOT row_security_active(t.oid)
FROM (
    SELECT objid AS sequence, refobjid AS relation, refobjsubid AS number FROM pg_catalog.pg_depend
    WHERE classid = 'pg_catalog.pg_class'::regclass AND refclassid = 'pg_catalog.pg_class'::regclass
      AND deptype IN ('a', 'i') AND refobjsubid > 0
    UNION
    SELECT d.refobjid, f.adrelid, f.adnum FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_attrdef f ON f.oid = d.objid
    WHERE d.classid = 'pg_catalog.pg_attrdef'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass
      AND d.refobjid <> f.adrelid
) used
JOIN pg_catalog.pg_sequence p ON p.seqrelid = used.sequence
JOIN pg_catalog.pg_class s ON s.oid = used.sequence AND s.relpersistence <> 't'
JOIN pg_catalog.pg_class t ON t.oid = used.relation
JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = used.number
JOIN pg_catalog.pg_type y ON y.oid = a.atttypid AND y.typcategory = 'N'
ORDER BY 1
"""

#: Foreign keys of tables, not of single partitions, with what is needed to look for orphans. A key of periods is no
#: matter of equal values; one that is NOT ENFORCED may have orphans.
_FOREIGN_KEYS = """
SELECT k.conrelid::regclass::text || '.' || quote_ident(k.conname), k.conrelid::regclass::text,
       k.confrelid::regclass::text,
       (SELECT array_agg(quote_ident(a.attname) ORDER BY i) FROM unnest(k.conkey) WITH ORDINALITY u (n, i)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.n),
       (SELECT array_agg(quote_ident(a.attname) ORDER BY i) FROM unnest(k.confkey) WITH ORDINALITY u (n, i)
        JOIN pg_catalog.pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.n),
       CASE WHEN has_table_privilege(k.conrelid, 'SELECT') AND has_table_privilege(k.confrelid, 'SELECT')
                 AND NOT row_security_active(k.conrelid) AND NOT row_security_active(k.confrelid)
                 AND coalesce(to_jsonb(k) ->> 'conperiod', 'false') = 'false'
            THEN coalesce((SELECT sum(pg_relation_size(p.relid)) FROM pg_catalog.pg_partition_tree(k.conrelid) p),
                          pg_relation_size(k.conrelid))::bigint END
FROM pg_catalog.pg_constraint k
WHERE k.contype = 'f' AND k.conparentid = 0 AND coalesce(to_jsonb(k) ->> 'conenforced', 'true') = 'true'
ORDER BY 1
"""


@dataclass(frozen=True)
class Check:
    """One check: C(status) is C(ok), C(failed), C(unexpected) (there, no danger, not expected) or C(allowed)."""

    check: str
    object: str
    status: str = "ok"
    expected: str = ""
    actual: str = ""
    hint: str = ""


def compare(expected: Snapshot, actual: Snapshot) -> list[Check]:
    """Compare two snapshots; a row for every property that was looked at.

    Extensions are compared by minimum version. Where the expectation says nothing of a kind, nothing is compared.
    What is not expected has failed if it opens or changes what is there; only what stands alone is C(unexpected).
    """
    rows: list[Check] = []
    for kind, title in KINDS.items():
        if kind not in expected:
            continue
        want, have = expected[kind] or {}, actual.get(kind) or {}
        for name, value in want.items():
            if name not in have:
                rows.append(Check(title, name, "failed", "present", "missing"))
            elif kind == "extensions":
                rows.append(_minimum(name, str(value), str(have[name])))
            else:
                rows += _compare_object(title, name, value, have[name])
        for name in [name for name in have if name not in want]:
            danger = _danger(kind, name, have[name], want)
            rows.append(Check(title, name, "failed" if danger else "unexpected", "absent", "present", danger))
    return rows


def _danger(kind: str, name: str, have: t.Any, want: t.Mapping[str, t.Any]) -> str:
    """Return how an object that is not expected opens or changes what is there; empty if it only stands alone.

    Args:
        kind: of the object.
        name: of the object.
        have: its properties.
        want: the expected objects of its kind.
    """
    if kind == "default_privileges":
        return "Whatever is made from now on gets other rights."
    if kind == "others":
        return "It acts on statements that were there before." if name.startswith("event trigger ") else ""
    if not isinstance(have, dict):
        return ""
    if kind == "functions":
        return "It runs with the rights of its owner." if have.get("security") == "definer" else ""
    if kind in ("views", "materialized_views"):
        # the application may read a new one by default; the proof of isolation looks through all that it may read
        readers = have.get("grants", {}).keys() - {"$app"}
        by_reader = re.search(r"security_invoker=(true|on|1)", have.get("options") or "")
        return "It is granted, and reads with the rights of its owner." if readers and not by_reader else ""
    parents = str(have.get("inherits", "")).split(", ")
    return "It adds rows to its parent." if any(x in want or f"public.{x}" in want for x in parents) else ""


def _compare_object(title: str, name: str, want: t.Any, have: t.Any) -> list[Check]:
    """Compare the properties of one object; both sides leave out empty ones."""
    if not isinstance(want, dict) or not isinstance(have, dict):
        return [_equal(title, name, want, have)]
    rows = []
    for key in sorted({*want, *have}, key=lambda key: (key not in want, key)):
        if key in _PARTS:
            inner_want, inner_have = want.get(key) or {}, have.get(key) or {}
            for part in sorted({*inner_want, *inner_have}):
                label = f"{name}: {part}"
                if part not in inner_have:
                    rows.append(Check(_PARTS[key], label, "failed", str(inner_want[part]), "missing"))
                elif part not in inner_want:
                    status = "failed" if key in _OPENING else "unexpected"
                    rows.append(Check(_PARTS[key], label, status, "absent", str(inner_have[part])))
                else:
                    rows.append(_equal(_PARTS[key], label, inner_want[part], inner_have[part]))
        else:
            rows.append(_equal(f"{title} {key.replace('_', ' ')}", name, want.get(key, "none"), have.get(key, "none")))
    return rows


def _equal(check: str, name: str, want: t.Any, have: t.Any) -> Check:
    return Check(check, name, "ok" if want == have else "failed", str(want), str(have))


def _minimum(name: str, want: str, have: str) -> Check:
    """Compare extension versions number by number: 1.10 is newer than 1.9."""
    numbers = [[int(part) for part in re.findall(r"\d+", version)] for version in (want, have)]
    status = "ok" if numbers[1] >= numbers[0] else "failed"
    return Check(
        "extension version",
        name,
        status,
        f">= {want}",
        have,
        "" if status == "ok" else "ALTER EXTENSION … UPDATE.",
    )


def health(connection: psycopg.Connection[t.Any]) -> list[Check]:
    """Look for what is there but does not work: invalid indexes, constraints never validated, disabled triggers."""
    rows = []
    for look in _HEALTH:
        if connection.info.server_version < look.since:
            continue
        broken = connection.execute(look.query).fetchall()
        rows += [Check(look.check, name, "failed", look.expected, actual, look.hint) for name, actual in broken]
        if not broken:
            rows.append(Check(look.check, "all", "ok", look.expected, look.expected))
    return rows


def database(
    connection: psycopg.Connection[t.Any],
    owner: str | None,
    application: str | None,
    *,
    roles: t.Collection[str] = (),
    kept_out: bool = False,
) -> list[Check]:
    """Look at the rights on the database itself, which a restore by hand loses, and at what its roles may and have set.

    Args:
        connection: any role.
        owner: who must own the database; None if that does not matter.
        application: who must be able to connect, if anybody.
        roles: further ones that the database is made for, such as the migrator.
        kept_out: whether a maintenance window keeps the application out on purpose.
    """
    row = connection.execute(_DATABASE, [application]).fetchone()
    assert row is not None
    name, owned_by, everybody, hindered = row
    rows = _roles(connection, {role for role in (owner, application, *roles) if role}, name)
    if owner:
        ok = owned_by == owner
        hint = "" if ok else "ALTER DATABASE … OWNER TO …"
        rows.append(Check("database owner", name, "ok" if ok else "failed", owner, owned_by, hint))
    hint = f"REVOKE ALL ON DATABASE … FROM PUBLIC: {everybody} keeps no window shut." if everybody else ""
    rows.append(
        Check("database rights of PUBLIC", name, "unexpected" if everybody else "ok", "none", everybody or "none", hint)
    )
    if application and not kept_out:
        connects = hindered == ""  # none if there is no such role
        told = (
            "GRANT CONNECT, LOGIN and a limit; or if a maintenance window is open: playbooks/maintenance.yml ends it."
        )
        hint = "" if connects else told
        actual = "may connect" if connects else hindered or "may not connect"
        rows.append(Check("application may connect", name, "ok" if connects else "failed", "may connect", actual, hint))
    return rows


def _roles(connection: psycopg.Connection[t.Any], roles: t.Collection[str], name: str) -> list[Check]:
    """Look at who has rights on the database, and at what it and its roles are and have set."""
    rows = []
    for grantee, rights, opens in connection.execute(_DATABASE_GRANTS).fetchall():
        status, hint = ("failed", "REVOKE … ON DATABASE … FROM …: it is the owner's.") if opens else ("ok", "")
        rows.append(Check("database grant", f"{name}: {grantee}", status, "CONNECT, TEMPORARY", rights, hint))
    told = "ALTER … RESET: every session has it from its start."
    found = connection.execute(_SETTINGS, [sorted(roles)]).fetchall()
    rows += [Check("setting", what, "failed", "none that changes what holds", entry, told) for what, entry in found]
    if not found:
        rows.append(Check("setting", "all"))
    query = "SELECT rolname, rolsuper FROM pg_catalog.pg_roles WHERE rolname = ANY (%s) ORDER BY 1"
    for role, is_super in connection.execute(query, [sorted(roles)]).fetchall():
        status, actual = ("failed", "SUPERUSER") if is_super else ("ok", "NOSUPERUSER")
        rows.append(Check("role", role, status, "NOSUPERUSER", actual, "ALTER ROLE … NOSUPERUSER." if is_super else ""))
    return rows


def sequences(connection: psycopg.Connection[t.Any]) -> tuple[list[Check], list[str]]:
    """Look for sequences that would give a number again that their column already has.

    Returns:
        A row for each sequence and column, and the names of those that the session's role may not read whole.
    """
    rows, unread = [], []
    for name, table, column, increment, readable in connection.execute(_SEQUENCES).fetchall():
        if not readable:
            unread.append(name)
            continue
        edge, behind = ("max", "<") if increment > 0 else ("min", ">")
        query = (
            f"SELECT s.last_value, t.edge FROM {name} s, (SELECT {edge}({column}) AS edge FROM {table}) t "  # noqa: S608
            f"WHERE s.last_value {behind} t.edge OR (s.last_value = t.edge AND NOT s.is_called)"
        )
        found = connection.execute(query.encode()).fetchone()
        rows.append(
            Check("sequence ahead", name)
            if found is None
            else Check(
                "sequence ahead",
                name,
                "failed",
                f"beyond {found[1]}",
                str(found[0]),
                f"SELECT setval('{name}', (SELECT {edge}({column}) FROM {table}));",  # noqa: S608 - for the reader
            )
        )
    return rows, unread


def orphans(connection: psycopg.Connection[t.Any], max_bytes: int) -> tuple[list[Check], list[str]]:
    """Look for rows that refer to none, also of foreign keys that are NOT VALID.

    Args:
        connection: as a role that sees all rows.
        max_bytes: tables larger than that are not read.

    Returns:
        A row for each foreign key, and the names of those that were not looked at: their table is too large, or the
        session's role does not see all of its rows.
    """
    rows, unread = [], []
    for name, child, parent, columns, keys, size in connection.execute(_FOREIGN_KEYS).fetchall():
        if size is None or size > max_bytes:
            unread.append(name)
            continue
        same = " AND ".join(f"p.{key} = c.{column}" for column, key in zip(columns, keys, strict=True))
        there = " AND ".join(f"c.{column} IS NOT NULL" for column in columns)
        query = (
            f"SELECT concat_ws(', ', {', '.join(f'c.{column}' for column in columns)}) FROM {child} c "  # noqa: S608
            f"WHERE {there} AND NOT EXISTS (SELECT FROM {parent} p WHERE {same}) LIMIT 1"
        )
        found = connection.execute(query.encode()).fetchone()
        rows.append(
            Check("no orphans", name)
            if found is None
            else Check(
                "no orphans",
                name,
                "failed",
                f"each row has its own in {parent}",
                f"{', '.join(columns)} = {found[0]}",
                "Rows came in while triggers were off, or the constraint is NOT VALID: delete or mend them.",
            )
        )
    return rows, unread


@dataclass(frozen=True)
class Allowance:
    """An exception that somebody has granted: patterns (fnmatch) of check and object, why, and until which day."""

    check: str
    object: str
    reason: str
    until: dt.date


def read_allowances(given: t.Sequence[t.Mapping[str, t.Any]]) -> list[Allowance]:
    """Return exceptions as the module has them.

    Raises:
        RunbookError: one has no reason, or no day.
    """
    found = []
    for number, one in enumerate(given, 1):
        try:
            until = dt.date.fromisoformat(str(one["until"]))
        except ValueError as error:
            raise RunbookError(
                f"verify_allow, entry {number}: until is {one['until']!r}, no day such as 2027-01-31"
            ) from error
        if not str(one["reason"]).strip():
            raise RunbookError(f"verify_allow, entry {number}: no reason", hint="Say why it is no danger until then.")
        found.append(Allowance(one["check"], one["object"], one["reason"], until))
    return found


def allow(rows: t.Iterable[Check], allowances: t.Sequence[Allowance], today: dt.date) -> list[Check]:
    """Return the rows, those that an exception covers as V(allowed) with its reason; one that is over covers nothing.

    Args:
        rows: all checks.
        allowances: exceptions.
        today: by the clock of the host.
    """

    def covers(one: Allowance, row: Check) -> bool:
        return fnmatch.fnmatchcase(row.check, one.check) and fnmatch.fnmatchcase(row.object, one.object)

    result = []
    for row in rows:
        found = [one for one in allowances if row.status != "ok" and covers(one, row)]
        valid = next((one for one in found if one.until >= today), None)
        if valid:
            result.append(replace(row, status="allowed", hint=f"{valid.reason} (until {valid.until})"))
        elif found:
            result.append(replace(row, hint=f"The exception ended on {found[0].until}: {found[0].reason}"))
        else:
            result.append(row)
    return result


def junit_of(rows: t.Sequence[Check], *, suite: str, seconds: float, unexpected_fails: bool = False) -> bytes:
    """Return the checks as JUnit XML, as AWX, GitLab and Jenkins read it.

    Allowed ones are skipped with the reason, and so are unexpected ones, unless they end the run red. What could not
    be looked at is skipped, too.
    """
    red = {"failed", "unexpected"} if unexpected_fails else {"failed"}
    root = ET.Element("testsuites")
    top = ET.SubElement(
        root,
        "testsuite",
        name=suite,
        tests=str(len(rows)),
        failures=str(sum(row.status in red for row in rows)),
        skipped=str(sum(row.status not in {"ok", *red} for row in rows)),
        errors="0",
        time=f"{seconds:.3f}",
    )
    for row in rows:
        case = ET.SubElement(top, "testcase", classname=row.check, name=_printable(row.object))
        told = _printable(f"expected {row.expected or 'nothing'}, is {row.actual or 'missing'}. {row.hint}")
        if row.status in red:
            ET.SubElement(case, "failure", message=told)
        elif row.status != "ok":
            ET.SubElement(case, "skipped", message=row.hint if row.status == "unproved" else f"{row.status}: {told}")
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))


def json_of(rows: t.Sequence[Check], **facts: t.Any) -> bytes:
    """Return all checks as JSON, the good ones too, with further facts."""
    return json.dumps({**facts, "checks": [asdict(row) for row in rows]}, ensure_ascii=False, indent=1).encode()


def _printable(text: str) -> str:
    """Return a text without the characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "?", text)


def table_of(rows: t.Iterable[Check], *, limit: int = 20) -> str:
    """Return what is wrong as text, failures first, with the place where long values begin to differ."""
    bad = sorted((row for row in rows if row.status not in ("ok", "allowed")), key=lambda row: row.status != "failed")
    lines = []
    for row in bad[:limit]:
        lines.append(f"  {row.status:<10}  {row.check}  {row.object}")
        want, have = _excerpts(row.expected, row.actual)
        if row.actual in ("missing", "present"):
            lines[-1] += f": {row.actual}"
        elif row.expected == "absent":
            lines[-1] += f": {have}"
        else:
            lines += [f"              expected  {want}", f"              actual    {have}"]
        if row.hint:
            lines.append(f"              hint      {row.hint}")
    if len(bad) > limit:
        lines.append(f"  … and {len(bad) - limit} more")
    return "\n".join(lines)


def _excerpts(want: str, have: str, width: int = 100) -> tuple[str, str]:
    """Shorten two long values to the part where they begin to differ."""
    if max(len(want), len(have)) <= width:
        return want, have
    same = next((i for i, (one, other) in enumerate(zip(want, have, strict=False)) if one != other), width)
    start = max(0, same - 20)
    mark = "…" if start else ""
    return f"{mark}{want[start : start + width]}", f"{mark}{have[start : start + width]}"
