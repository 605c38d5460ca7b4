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
import re
import typing as t

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
    'options', (SELECT string_agg(o, ', ' ORDER BY o) FROM unnest(c.reloptions) o),
    'method', (SELECT amname FROM pg_catalog.pg_am WHERE oid = c.relam),
    'replica_identity', CASE WHEN c.relkind IN ('r', 'p', 'm') THEN CASE c.relreplident WHEN 'f' THEN 'full'
        WHEN 'n' THEN 'nothing' WHEN 'i' THEN (SELECT 'index ' || i.indexrelid::regclass FROM pg_catalog.pg_index i
                                              WHERE i.indrelid = c.oid AND i.indisreplident) END END,
    'inherits', (SELECT string_agg(h.inhparent::regclass::text, ', ' ORDER BY h.inhseqno)
        FROM pg_catalog.pg_inherits h WHERE h.inhrelid = c.oid),
    'server', (SELECT concat_ws(' ', quote_ident(v.srvname), array_to_string(f.ftoptions, ', '))
        FROM pg_catalog.pg_foreign_table f JOIN pg_catalog.pg_foreign_server v ON v.oid = f.ftserver
        WHERE f.ftrelid = c.oid),
    'row_security', CASE WHEN c.relrowsecurity AND c.relforcerowsecurity THEN 'forced'
                         WHEN c.relrowsecurity THEN 'enabled' ELSE 'off' END,
    'persistence', c.relpersistence,
    'partition', coalesce(pg_get_partkeydef(c.oid), pg_get_expr(c.relpartbound, c.oid), ''),
    'columns', (SELECT coalesce(json_object_agg(a.attname,
            format_type(a.atttypid, a.atttypmod)
            || CASE WHEN a.attcollation <> ty.typcollation THEN ' collate ' || a.attcollation::regcollation ELSE '' END
            || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
            || CASE WHEN a.attidentity <> '' THEN ' identity ' || a.attidentity::text ELSE '' END
            || CASE WHEN a.attstorage <> ty.typstorage THEN ' storage ' || a.attstorage::text ELSE '' END
            || CASE WHEN a.attcompression <> '' THEN ' compression ' || a.attcompression::text ELSE '' END
            || CASE WHEN a.attstattarget >= 0 THEN ' statistics ' || a.attstattarget ELSE '' END
            || coalesce(' with ' || array_to_string(a.attoptions, ', '), '')
            || CASE WHEN a.attgenerated <> '' THEN CASE a.attgenerated WHEN 'v' THEN ' virtual' ELSE '' END
                        || ' generated ' || pg_get_expr(d.adbin, d.adrelid)
                    WHEN d.oid IS NOT NULL THEN ' default ' || pg_get_expr(d.adbin, d.adrelid) ELSE '' END
            ORDER BY a.attnum), '{{}}')
        FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type ty ON ty.oid = a.atttypid
        LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
    'column_grants', (SELECT coalesce(json_object_agg(a.attname || ' to ' || CASE WHEN g.grantee = 0 THEN 'PUBLIC'
            ELSE {_name("g.grantee")} END || ': ' || g.privilege_type, g.is_grantable), '{{}}')
        FROM pg_catalog.pg_attribute a, aclexplode(a.attacl) g WHERE a.attrelid = c.oid AND NOT a.attisdropped),
    'definition', CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END,
    'constraints', (SELECT coalesce(json_object_agg(k.conname, pg_get_constraintdef(k.oid)), '{{}}')
        -- 18 has a constraint for each NOT NULL, which the column says already
        FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype <> 'n'),
    'indexes', (SELECT coalesce(json_object_agg(i.indexrelid::regclass, pg_get_indexdef(i.indexrelid)), '{{}}')
        FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid
        AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = c.oid
                        AND k.contype IN ('p', 'u', 'x'))),
    'policies', (SELECT coalesce(json_object_agg(p.polname, concat_ws(' ',
            CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
            'for ' || CASE p.polcmd WHEN 'r' THEN 'select' WHEN 'a' THEN 'insert' WHEN 'w' THEN 'update'
                                    WHEN 'd' THEN 'delete' ELSE 'all' END,
            'to ' || (SELECT string_agg(CASE WHEN r = 0 THEN 'public' ELSE {_name("r")} END, ', '
                                       ORDER BY CASE WHEN r = 0 THEN 'public' ELSE {_name("r")} END)
                      FROM unnest(p.polroles) r),
            'using (' || pg_get_expr(p.polqual, p.polrelid) || ')',
            'with check (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')')), '{{}}')
        FROM pg_catalog.pg_policy p WHERE p.polrelid = c.oid),
    'triggers', (SELECT coalesce(json_object_agg(g.tgname, pg_get_triggerdef(g.oid)
            || CASE g.tgenabled WHEN 'O' THEN '' WHEN 'D' THEN ' DISABLED' ELSE ' ENABLED ' || g.tgenabled::text END),
            '{{}}')
        FROM pg_catalog.pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal),
    'rules', (SELECT coalesce(json_object_agg(w.rulename, pg_get_ruledef(w.oid)
            || CASE w.ev_enabled WHEN 'O' THEN '' WHEN 'D' THEN ' DISABLED' ELSE ' ENABLED ' || w.ev_enabled::text END),
            '{{}}')
        FROM pg_catalog.pg_rewrite w WHERE w.ev_class = c.oid AND w.rulename <> '_RETURN'),
    'statistics', (SELECT coalesce(json_object_agg(x.stxname, pg_get_statisticsobjdef(x.oid)), '{{}}')
        FROM pg_catalog.pg_statistic_ext x WHERE x.stxrelid = c.oid))
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
    'arguments', nullif(pg_get_function_arguments(p.oid), pg_get_function_identity_arguments(p.oid)),
    'returns', coalesce(pg_get_function_result(p.oid), ''),
    'language', l.lanname,
    'volatility', CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END,
    'parallel', CASE p.proparallel WHEN 's' THEN 'safe' WHEN 'r' THEN 'restricted' ELSE 'unsafe' END,
    'strict', p.proisstrict,
    'leakproof', p.proleakproof,  -- such a function is called before the policies are asked
    'planner', concat_ws(', ', CASE WHEN p.procost <> CASE WHEN l.lanname IN ('c', 'internal') THEN 1 ELSE 100 END
            THEN 'cost ' || p.procost END, CASE WHEN p.proretset AND p.prorows <> 1000 THEN 'rows ' || p.prorows END,
        CASE WHEN p.prosupport <> 0 THEN 'support ' || p.prosupport END),
    'aggregate', (SELECT concat_ws(', ', g.aggkind::text, g.aggtransfn, g.aggtranstype::regtype,
            nullif(g.aggfinalfn, 0::regproc), nullif(g.aggcombinefn, 0::regproc), nullif(g.aggmtransfn, 0::regproc),
            'from ' || g.agginitval) FROM pg_catalog.pg_aggregate g WHERE g.aggfnoid = p.oid),
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
    'persistence', c.relpersistence,
    'owned_by', (SELECT d.refobjid::regclass || '.' || quote_ident(a.attname) FROM pg_catalog.pg_depend d
        JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype IN ('a', 'i')
          AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjsubid > 0),
    'type', format_type(s.seqtypid, NULL), 'increment', s.seqincrement, 'cycle', s.seqcycle,
    'range', concat_ws(', ',
        CASE WHEN s.seqincrement < 0 OR s.seqmin <> 1 THEN 'from ' || s.seqmin END,
        CASE WHEN s.seqincrement < 0 OR s.seqmax <> CASE s.seqtypid WHEN 'int2'::regtype THEN 32767
                WHEN 'int4'::regtype THEN 2147483647 ELSE 9223372036854775807 END THEN 'to ' || s.seqmax END,
        CASE WHEN s.seqstart <> CASE WHEN s.seqincrement > 0 THEN s.seqmin ELSE s.seqmax END
             THEN 'start ' || s.seqstart END,
        CASE WHEN s.seqcache <> 1 THEN 'cache ' || s.seqcache END))
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_sequence s ON s.seqrelid = c.oid
WHERE {_ours("c.oid", "pg_class")}
"""

_TYPES = f"""
SELECT quote_ident(n.nspname) || '.' || quote_ident(y.typname), json_build_object(
    'owner', {_name("y.typowner")},
    'grants', {_grants("y.typacl", "T", "y.typowner")},
    'definition', CASE y.typtype
        WHEN 'e' THEN 'enum ' || (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder)
                                  FROM pg_catalog.pg_enum e WHERE e.enumtypid = y.oid)
        WHEN 'd' THEN 'domain ' || format_type(y.typbasetype, y.typtypmod)
            || CASE WHEN y.typcollation <> b.typcollation THEN ' collate ' || y.typcollation::regcollation ELSE '' END
            || CASE WHEN y.typnotnull THEN ' not null' ELSE '' END || coalesce(' default ' || y.typdefault, '')
            || coalesce((SELECT string_agg(concat(' ', conname, ' ', pg_get_constraintdef(k.oid)), '' ORDER BY conname)
                         FROM pg_catalog.pg_constraint k WHERE k.contypid = y.oid AND k.contype <> 'n'), '')
        WHEN 'c' THEN 'composite ' || (SELECT string_agg(quote_ident(a.attname) || ' '
                || format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum) FROM pg_catalog.pg_attribute a
                WHERE a.attrelid = y.typrelid AND a.attnum > 0 AND NOT a.attisdropped)
        WHEN 'r' THEN 'range of ' || (SELECT concat_ws(', ', format_type(r.rngsubtype, NULL),
                nullif(r.rngcollation, 0)::regcollation, nullif(r.rngcanonical, 0::regproc),
                nullif(r.rngsubdiff, 0::regproc)) FROM pg_catalog.pg_range r WHERE r.rngtypid = y.oid)
        ELSE concat_ws(', ', 'base', y.typinput, y.typoutput, y.typlen, y.typalign, y.typstorage) END)
FROM pg_catalog.pg_type y JOIN pg_catalog.pg_namespace n ON n.oid = y.typnamespace
LEFT JOIN pg_catalog.pg_class c ON c.oid = y.typrelid LEFT JOIN pg_catalog.pg_type b ON b.oid = y.typbasetype
WHERE (y.typtype IN ('e', 'd', 'r') OR (y.typtype = 'c' AND c.relkind = 'c')
       OR (y.typtype = 'b' AND NOT EXISTS (SELECT FROM pg_catalog.pg_type e WHERE e.typarray = y.oid)))
  AND {_ours("y.oid", "pg_type")}
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
                  string_agg(a.privilege_type || CASE WHEN a.is_grantable THEN '*' ELSE '' END, ', '
                             ORDER BY a.privilege_type) AS privileges
           FROM aclexplode(d.defaclacl) a WHERE a.grantee <> d.defaclrole GROUP BY 1) g)
FROM pg_catalog.pg_default_acl d LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace
"""

#: What else a database can hold. Settler uses none of it, so the expectation is an empty list, and what is there is
#: told. Options of servers and user mappings may be secrets: they are not read.
_OTHERS = f"""
SELECT i.type || ' ' || i.identity, json_build_object('owner', {_name("o.owner")}, 'definition', o.definition)
FROM (
    SELECT 'pg_publication'::regclass AS catalogue, p.oid, p.pubowner AS owner, concat_ws(', ',
        CASE WHEN p.pubinsert THEN 'insert' END, CASE WHEN p.pubupdate THEN 'update' END,
        CASE WHEN p.pubdelete THEN 'delete' END, CASE WHEN p.pubtruncate THEN 'truncate' END,
        CASE WHEN p.pubviaroot THEN 'via root' END, CASE WHEN p.puballtables THEN 'all tables' ELSE
            (SELECT string_agg(concat_ws(' ', format('%%I.%%I', v.schemaname, v.tablename),
                'where ' || (to_jsonb(v) ->> 'rowfilter')), ', ' ORDER BY 1)
             FROM pg_catalog.pg_publication_tables v WHERE v.pubname = p.pubname) END) AS definition
    FROM pg_catalog.pg_publication p
    UNION ALL SELECT 'pg_subscription'::regclass, oid, subowner, array_to_string(subpublications, ', ')
    FROM pg_catalog.pg_subscription
    WHERE subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
    UNION ALL SELECT 'pg_event_trigger'::regclass, oid, evtowner, concat_ws(', ', evtevent, evtfoid::regprocedure,
        CASE evtenabled WHEN 'O' THEN 'enabled' WHEN 'D' THEN 'disabled' ELSE 'enabled ' || evtenabled::text END,
        array_to_string(evttags, ', '))
    FROM pg_catalog.pg_event_trigger
    UNION ALL SELECT 'pg_collation'::regclass, oid, collowner, concat_ws(', ', collprovider, collcollate, collctype,
        to_jsonb(c) ->> 'colliculocale', to_jsonb(c) ->> 'colllocale',
        CASE WHEN collisdeterministic THEN NULL ELSE 'not deterministic' END)
    FROM pg_catalog.pg_collation c
    UNION ALL SELECT 'pg_operator'::regclass, oid, oprowner, oprcode::text FROM pg_catalog.pg_operator
    UNION ALL SELECT 'pg_opclass'::regclass, oid, opcowner, CASE WHEN opcdefault THEN 'default' END
    FROM pg_catalog.pg_opclass
    UNION ALL SELECT 'pg_opfamily'::regclass, oid, opfowner, NULL FROM pg_catalog.pg_opfamily
    UNION ALL SELECT 'pg_am'::regclass, oid, NULL, amhandler::text FROM pg_catalog.pg_am
    UNION ALL SELECT 'pg_cast'::regclass, oid, NULL,
        concat_ws(', ', nullif(castfunc, 0)::regprocedure, castcontext::text, castmethod::text) FROM pg_catalog.pg_cast
    UNION ALL SELECT 'pg_transform'::regclass, oid, NULL, concat_ws(', ', trffromsql, trftosql)
    FROM pg_catalog.pg_transform
    UNION ALL SELECT 'pg_conversion'::regclass, oid, conowner, conproc::text FROM pg_catalog.pg_conversion
    UNION ALL SELECT 'pg_language'::regclass, oid, lanowner, CASE WHEN lanpltrusted THEN 'trusted' END
    FROM pg_catalog.pg_language
    UNION ALL SELECT 'pg_ts_config'::regclass, oid, cfgowner, NULL FROM pg_catalog.pg_ts_config
    UNION ALL SELECT 'pg_ts_dict'::regclass, oid, dictowner, dictinitoption FROM pg_catalog.pg_ts_dict
    UNION ALL SELECT 'pg_ts_parser'::regclass, oid, NULL, NULL FROM pg_catalog.pg_ts_parser
    UNION ALL SELECT 'pg_ts_template'::regclass, oid, NULL, NULL FROM pg_catalog.pg_ts_template
    UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid, fdwowner, nullif(fdwhandler, 0)::regproc::text
    FROM pg_catalog.pg_foreign_data_wrapper
    UNION ALL SELECT 'pg_foreign_server'::regclass, oid, srvowner, NULL FROM pg_catalog.pg_foreign_server
) o CROSS JOIN LATERAL pg_identify_object(o.catalogue, o.oid, 0) i
WHERE o.oid >= 16384 AND (i.schema IS NULL OR (i.schema <> ALL (%(exclude)s) AND i.schema !~ '^pg_'))
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.objid = o.oid AND e.classid = o.catalogue
                  AND e.deptype = 'e')
UNION ALL
SELECT format('user mapping of %%I on %%I', CASE WHEN u.umuser = 0 THEN 'public' ELSE {_name("u.umuser")} END,
              u.srvname), json_build_object() FROM pg_catalog.pg_user_mappings u
"""

_KINDS = {"r": "tables", "p": "tables", "f": "tables", "v": "views", "m": "materialized_views"}


_SEARCH_PATH = "SELECT set_config('search_path', coalesce(%s, current_setting('search_path')), false)"


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
    # Names are written without their schema only where it is public, whatever path the session has.
    before = connection.execute(_SEARCH_PATH, [None]).fetchone()
    connection.execute(_SEARCH_PATH, ["public"])
    try:
        return _read(connection, arguments)
    finally:
        if before and connection.info.transaction_status != psycopg.pq.TransactionStatus.INERROR:
            connection.execute(_SEARCH_PATH, [before[0]])


def _read(connection: psycopg.Connection[t.Any], arguments: t.Mapping[str, t.Any]) -> Snapshot:
    """Ask all questions."""
    result: Snapshot = {kind: {} for kind in ("schemas", "extensions", "types", *dict.fromkeys(_KINDS.values()))}
    for relkind, name, properties in connection.execute(_RELATIONS, arguments):
        if properties["definition"]:
            properties["definition"] = plain_view(properties["definition"])
        result[_KINDS[relkind]][name] = properties
    for kind, query in (
        ("schemas", _SCHEMAS),
        ("extensions", _EXTENSIONS),
        ("types", _TYPES),
        ("sequences", _SEQUENCES),
        ("functions", _FUNCTIONS),
        ("default_privileges", _DEFAULT_PRIVILEGES),
        ("others", _OTHERS),
    ):
        result[kind] = dict(connection.execute(query, arguments).fetchall())
    return t.cast("Snapshot", _without_defaults(result))


def plain_view(text: str) -> str:
    """Return a view's query as all majors write it.

    Up to 15 each column has its table before it; 16 and newer leave that out where the query reads a single one.
    """
    text = " ".join(text.split())
    source = _single_source(text)
    return re.sub(rf'(?<![\w$."]){re.escape(source)}\.(?=[a-z_"])', "", text) if source else text


def _single_source(text: str) -> str | None:
    """Return the name under which a query reads the only thing that it reads, if it is only one."""
    flat, depth = "", 0
    for part in re.findall(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|[()]|[^'"()]+""", text):
        if part == ")":
            depth -= 1
        if not depth:
            flat += "''" if part[0] == "'" else part
        if part == "(":
            depth += 1
    found = re.search(r"\bFROM (.+?)(?: (?:WHERE|GROUP BY|HAVING|WINDOW|ORDER BY|LIMIT|OFFSET|FETCH|FOR) |;|$)", flat)
    if not found or re.search(r",| JOIN ", found[1]) or re.search(r" (?:UNION|INTERSECT|EXCEPT) ", flat):
        return None
    name = re.search(r"""("(?:[^"]|"")+"|[\w$]+)(?:\(\))?$""", found[1])
    return name[1] if name else None


def digest(catalogue: Snapshot) -> str:
    """Return one SHA-256 of a snapshot, in hex: the same for the same schema, whatever the server.

    Versions of extensions are left out, because each major brings its own.
    """
    plain = {**catalogue, "extensions": sorted(catalogue.get("extensions") or ())}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


#: What an object has unless something else is said; left out to keep the expectation readable.
_DEFAULTS = {
    "row_security": "off",
    "persistence": "p",
    "method": "heap",
    "leakproof": False,
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


_OPTIONAL = frozenset(
    {"constraints", "indexes", "policies", "triggers", "grants", "column_grants", "rules", "statistics"}
)
