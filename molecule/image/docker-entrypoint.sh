#!/bin/sh
# Entry point of the image that tools/container.py builds where the official one cannot be had.
# It has the official image's interface, so that nothing else knows the difference:
# POSTGRES_PASSWORD, POSTGRES_USER, POSTGRES_DB, POSTGRES_INITDB_ARGS, POSTGRES_HOST_AUTH_METHOD, PGDATA and
# /docker-entrypoint-initdb.d (*.sh, *.sql, *.sql.gz).
set -eu

superuser=${POSTGRES_USER:-postgres}
database=${POSTGRES_DB:-$superuser}
host_method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
sockets=/var/run/postgresql

require_a_password() {
    if [ -z "${POSTGRES_PASSWORD:-}" ] && [ "$host_method" != trust ]; then
        echo 'error: set POSTGRES_PASSWORD, or POSTGRES_HOST_AUTH_METHOD=trust for a server without passwords' >&2
        exit 1
    fi
}

# PostgreSQL refuses to run as root: hand it the folders, then start over as its own user.
become_postgres() {
    mkdir -p "$PGDATA" "$sockets"
    chown postgres: "$PGDATA" "$sockets"
    chmod 0700 "$PGDATA"
    chmod 3777 "$sockets"
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
}

initialise() {
    # A file, not an argument: every process of the machine can read arguments.
    password_file=$(umask 077 && mktemp)
    printf '%s\n' "${POSTGRES_PASSWORD:-}" >"$password_file"
    if [ -n "${POSTGRES_PASSWORD:-}" ]; then
        set -- --pwfile="$password_file"
    else
        set --
    fi
    # shellcheck disable=SC2086 # POSTGRES_INITDB_ARGS is several arguments, as in the official image
    initdb --username="$superuser" --auth-local=trust --auth-host="$host_method" "$@" ${POSTGRES_INITDB_ARGS:-}
    rm -f "$password_file"
    printf 'host all all all %s\n' "$host_method" >>"$PGDATA/pg_hba.conf"
}

run_sql() {
    psql --no-psqlrc --set=ON_ERROR_STOP=1 --no-password --username="$superuser" --host="$sockets" "$@"
}

run_init_files() {
    for file in /docker-entrypoint-initdb.d/*; do
        case $file in
            *.sh) sh "$file" ;;
            *.sql) run_sql --dbname="$database" --file="$file" ;;
            *.sql.gz) gunzip -c "$file" | run_sql --dbname="$database" ;;
        esac
    done
}

# Only the socket listens while the database is made: a client on TCP never meets a half-made server.
populate() {
    pg_ctl --silent --wait --options="-c listen_addresses=''" start
    if [ "$database" != postgres ]; then
        echo 'CREATE DATABASE :"name"' | run_sql --dbname=postgres --set=name="$database"
    fi
    run_init_files
    pg_ctl --silent --wait --mode=fast stop
}

case ${1:--} in
    -*) set -- postgres "$@" ;;
esac

if [ "$1" = postgres ]; then
    if [ "$(id -u)" = 0 ]; then
        become_postgres "$@"
    fi
    if [ ! -s "$PGDATA/PG_VERSION" ]; then
        require_a_password
        initialise
        populate
    fi
    unset POSTGRES_PASSWORD
fi

exec "$@"
