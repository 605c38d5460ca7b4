# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The catalogue of a database as plain data: readable in review, comparable between servers, without OIDs.

Everything is read from pg_catalog: information_schema hides what the reading role has no right on, repeats
triggers for each of their events, and mixes the functions of extensions with ours.
"""

from __future__ import annotations

import hashlib
import json
import typing as t

if t.TYPE_CHECKING:
    from ansible_collections.settler.runbook.plugins.module_utils._psycopg import psycopg

Snapshot = dict[str, dict[str, t.Any]]

#: Objects of extensions belong to the extension; system schemas and the ledger are not the application's.
_OURS = """
    n.nspname <> ALL (%(exclude)s) AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = {oid} AND e.classid = '{catalogue}'::regclass
                    AND e.deptype = 'e')
"""
_GRANTS = """
    (SELECT coalesce(json_object_agg(grantee, privileges), '{{}}')
     FROM (SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE {grantee} END AS grantee,
                  string_agg(a.privilege_type || CASE WHEN a.is_grantable THEN '*' ELSE '' END, ', '
                             ORDER BY a.privilege_type) AS privileges
           FROM aclexplode(coalesce({acl}, acldefault('{kind}', {owner}))) a
           WHERE a.grantee <> {owner} GROUP BY 1) g)
"""


def _name(role: str) -> str:
    """Return SQL for a role's name, or for the name that stands for it."""
    return f"coalesce(%(names)s::jsonb ->> pg_get_userbyid({role}), pg_get_userbyid({role}))"


def _ours(oid: str, catalogue: str) -> str:
    return _OURS.format(oid=oid, catalogue=catalogue)


def _grants(acl: str, kind: str, owner: str) -> str:
    return _GRANTS.format(acl=acl, kind=kind, owner=owner, grantee=_name("a.grantee"))


_RELATIONS = rf"""
SELECT c.relkind, quote_ident(n.nspname) || '.' || quote_ident(c.relname), json_build_object(
    'owner', {_name("c.relowner")},
    'grants', {_grants("c.relacl", "r", "c.relowner")},
    'options', coalesce(array_to_string(c.reloptions, ', '), ''),
    'row_security', CASE WHEN c.relrowsecurity AND c.relforcerowsecurity THEN 'forced'
                         WHEN c.relrowsecurity THEN 'enabled' ELSE 'off' END,
    'persistence', c.relpersistence,
    'partition', coalesce(pg_get_partkeydef(c.oid), pg_get_expr(c.relpartbound, c.oid), ''),
    'columns', (SELECT coalesce(json_object_agg(a.attname,
            format_type(a.atttypid, a.atttypmod)
            || CASE WHEN a.attcollation <> ty.typcollation THEN ' collate ' || a.attcollation::regcollation ELSE '' END
            || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
            || CASE WHEN a.attidentity <> '' THEN ' identity ' || a.attidentity::text ELSE '' END
            || CASE WHEN a.attgenerated <> '' THEN ' generated ' || pg_get_expr(d.adbin, d.adrelid)
                    WHEN d.oid IS NOT NULL THEN ' default ' || pg_get_expr(d.adbin, d.adrelid) ELSE '' END
            ORDER BY a.attnum), '{{}}')
        FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type ty ON ty.oid = a.atttypid
        LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
    'column_grants', (SELECT coalesce(json_object_agg(a.attname || ' to ' || CASE WHEN g.grantee = 0 THEN 'PUBLIC'
            ELSE {_name("g.grantee")} END || ': ' || g.privilege_type, g.is_grantable), '{{}}')
        FROM pg_catalog.pg_attribute a, aclexplode(a.attacl) g WHERE a.attrelid = c.oid AND NOT a.attisdropped),
    'definition', CASE WHEN c.relkind IN ('v', 'm') THEN
        -- 16 and newer leave out qualifiers that older servers write
        btrim(regexp_replace(
            regexp_replace(pg_get_viewdef(c.oid), '\m[a-z_][a-z0-9_]*\.(?=[a-z_"])', '', 'g'), '\s+', ' ', 'g'))
        ELSE '' END,
    'constraints', (SELECT coalesce(json_object_agg(k.conname, pg_get_constraintdef(k.oid)), '{{}}')
        FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype <> 'n'),
    'indexes', (SELECT coalesce(json_object_agg(i.indexrelid::regclass, pg_get_indexdef(i.indexrelid)), '{{}}')
        FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = c.oid
                        AND k.contype IN ('p', 'u', 'x'))),
    'policies', (SELECT coalesce(json_object_agg(p.polname, concat_ws(' ',
            CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
            'for ' || CASE p.polcmd WHEN 'r' THEN 'select' WHEN 'a' THEN 'insert' WHEN 'w' THEN 'update'
                                    WHEN 'd' THEN 'delete' ELSE 'all' END,
            'to ' || (SELECT string_agg(CASE WHEN r = 0 THEN 'public' ELSE {_name("r")} END, ', ' ORDER BY r)
                      FROM unnest(p.polroles) r),
            'using (' || pg_get_expr(p.polqual, p.polrelid) || ')',
            'with check (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')')), '{{}}')
        FROM pg_catalog.pg_policy p WHERE p.polrelid = c.oid),
    'triggers', (SELECT coalesce(json_object_agg(g.tgname, pg_get_triggerdef(g.oid)
            || CASE g.tgenabled WHEN 'O' THEN '' WHEN 'D' THEN ' DISABLED' ELSE ' ENABLED ' || g.tgenabled::text END),
            '{{}}')
        FROM pg_catalog.pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND {_ours("c.oid", "pg_class")}
"""

_FUNCTIONS = f"""
SELECT format('%%I.%%I(%%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)),
    json_build_object(
    'owner', {_name("p.proowner")},
    'grants', {_grants("p.proacl", "f", "p.proowner")},
    'kind', CASE p.prokind WHEN 'p' THEN 'procedure' WHEN 'a' THEN 'aggregate' WHEN 'w' THEN 'window'
            ELSE 'function' END,
    'returns', coalesce(pg_get_function_result(p.oid), ''),
    'language', l.lanname,
    'volatility', CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END,
    'parallel', CASE p.proparallel WHEN 's' THEN 'safe' WHEN 'r' THEN 'restricted' ELSE 'unsafe' END,
    'strict', p.proisstrict,
    'security', CASE WHEN p.prosecdef THEN 'definer' ELSE 'invoker' END,
    'settings', coalesce(array_to_string(p.proconfig, ', '), ''),
    'body', encode(sha256(convert_to(coalesce(pg_get_function_sqlbody(p.oid), p.prosrc), 'UTF8')), 'hex'))
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
JOIN pg_catalog.pg_language l ON l.oid = p.prolang
WHERE {_ours("p.oid", "pg_proc")}
"""

_SEQUENCES = f"""
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), json_build_object(
    'owner', {_name("c.relowner")},
    'grants', {_grants("c.relacl", "s", "c.relowner")},
    'type', format_type(s.seqtypid, NULL), 'increment', s.seqincrement, 'cycle', s.seqcycle)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid
WHERE {_ours("c.oid", "pg_class")}
"""

_TYPES = f"""
SELECT quote_ident(n.nspname) || '.' || quote_ident(y.typname), json_build_object(
    'owner', {_name("y.typowner")},
    'definition', CASE y.typtype
        WHEN 'e' THEN 'enum ' || (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder)
                                  FROM pg_catalog.pg_enum e WHERE e.enumtypid = y.oid)
        WHEN 'd' THEN 'domain ' || format_type(y.typbasetype, y.typtypmod)
            || coalesce((SELECT string_agg(' ' || pg_get_constraintdef(k.oid), '' ORDER BY k.conname)
                         FROM pg_catalog.pg_constraint k WHERE k.contypid = y.oid), '')
        WHEN 'c' THEN 'composite ' || (SELECT string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', '
                                      ORDER BY a.attnum) FROM pg_catalog.pg_attribute a
                                      WHERE a.attrelid = y.typrelid AND a.attnum > 0 AND NOT a.attisdropped)
        ELSE 'range' END)
FROM pg_catalog.pg_type y JOIN pg_catalog.pg_namespace n ON n.oid = y.typnamespace
LEFT JOIN pg_catalog.pg_class c ON c.oid = y.typrelid
WHERE (y.typtype IN ('e', 'd', 'r') OR (y.typtype = 'c' AND c.relkind = 'c')) AND {_ours("y.oid", "pg_type")}
"""

_SCHEMAS = f"""
SELECT quote_ident(n.nspname), json_build_object('owner', {_name("n.nspowner")},
    'grants', {_grants("n.nspacl", "n", "n.nspowner")})
FROM pg_catalog.pg_namespace n
WHERE {_ours("n.oid", "pg_namespace")}
"""

_EXTENSIONS = """
SELECT x.extname, to_jsonb(x.extversion) FROM pg_catalog.pg_extension x WHERE x.extname <> 'plpgsql'
"""

_DEFAULT_PRIVILEGES = f"""
SELECT concat_ws(' ', {_name("d.defaclrole")}, 'in', coalesce(n.nspname, 'all schemas'),
    'on', CASE d.defaclobjtype WHEN 'r' THEN 'tables' WHEN 'S' THEN 'sequences' WHEN 'f' THEN 'functions'
          WHEN 'T' THEN 'types' WHEN 'n' THEN 'schemas' ELSE d.defaclobjtype::text END),
    (SELECT coalesce(json_object_agg(grantee, privileges), '{{}}')
     FROM (SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE {_name("a.grantee")} END AS grantee,
                  string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type) AS privileges
           FROM aclexplode(d.defaclacl) a WHERE a.grantee <> d.defaclrole GROUP BY 1) g)
FROM pg_catalog.pg_default_acl d LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace
"""

_KINDS = {"r": "tables", "p": "tables", "f": "tables", "v": "views", "m": "materialized_views"}


def snapshot(
    connection: psycopg.Connection[t.Any],
    *,
    exclude: t.Sequence[str] = (),
    role_names: t.Mapping[str, str] | None = None,
) -> Snapshot:
    """Read the catalogue.

    Args:
        connection: any role may read pg_catalog; a read-only one on a standby is enough.
        exclude: schemas to leave out, such as the ledger's.
        role_names: real role name -> name to write instead, because roles differ by environment
            (C({"settler_owner": "$owner"})).

    Returns:
        kind (C(tables), C(functions) …) -> object -> properties. Empty properties are left out.
    """
    arguments = {"exclude": list(exclude), "names": json.dumps(dict(role_names or {}))}
    result: Snapshot = {kind: {} for kind in ("schemas", "extensions", "types", *dict.fromkeys(_KINDS.values()))}
    for relkind, name, properties in connection.execute(_RELATIONS, arguments):
        result[_KINDS[relkind]][name] = properties
    for kind, query in (
        ("schemas", _SCHEMAS),
        ("extensions", _EXTENSIONS),
        ("types", _TYPES),
        ("sequences", _SEQUENCES),
        ("functions", _FUNCTIONS),
        ("default_privileges", _DEFAULT_PRIVILEGES),
    ):
        result[kind] = dict(connection.execute(query, arguments).fetchall())
    return t.cast("Snapshot", _without_defaults(result))


def digest(catalogue: Snapshot) -> str:
    """Return one SHA-256 of a snapshot, in hex."""
    text = json.dumps(catalogue, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


#: What an object has unless something else is said; left out to keep the expectation readable.
_DEFAULTS = {
    "row_security": "off",
    "persistence": "p",
    "kind": "function",
    "security": "invoker",
    "parallel": "unsafe",
    "cycle": False,
    "strict": False,
    "increment": 1,
}


def _without_defaults(value: t.Any) -> t.Any:
    """Leave out what is empty or the default; views have no row security of their own."""
    if not isinstance(value, dict):
        return value
    cleaned = {key: _without_defaults(inner) for key, inner in value.items()}
    return {
        key: inner
        for key, inner in cleaned.items()
        if inner not in ("", None) and inner != _DEFAULTS.get(key, object()) and not (inner == {} and key in _OPTIONAL)
    }


_OPTIONAL = frozenset({"constraints", "indexes", "policies", "triggers", "grants", "column_grants"})
