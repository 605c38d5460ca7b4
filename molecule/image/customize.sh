#!/bin/sh
# Hook of mmdebstrap for the image of tools/postgres_image.py; $1 is the root of the new file system.
# Runs before PostgreSQL is installed (MMDEBSTRAP_HOOK=essential) and after everything is (customize).
set -eu

root=$1

# The server is made by the entry point, at the container's first start.
no_cluster_at_installation() {
    mkdir -p "$root/etc/postgresql-common"
    echo 'create_main_cluster = false' >"$root/etc/postgresql-common/createcluster.conf"
}

listen_everywhere() {
    for sample in "$root"/usr/share/postgresql/*/postgresql.conf.sample; do
        sed -i "s/^#listen_addresses = 'localhost'/listen_addresses = '*'/" "$sample"
        grep -q "^listen_addresses = '\*'" "$sample"
    done
}

# Debian's wrappers need Perl, PostgreSQL does not.
remove_perl() {
    rm -rf "$root"/usr/bin/perl* "$root"/usr/share/perl* "$root"/usr/lib/*/perl*
}

case $MMDEBSTRAP_HOOK in
    essential)
        no_cluster_at_installation
        ;;
    customize)
        chmod 0755 "$root/usr/local/bin/docker-entrypoint.sh"
        mkdir "$root/docker-entrypoint-initdb.d"
        listen_everywhere
        remove_perl
        ;;
esac
