# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The connection options that every module of this collection shares."""

from __future__ import annotations


class ModuleDocFragment:
    """Options of C(settler.runbook.connection); names as in community.postgresql, so one dict feeds both."""

    DOCUMENTATION = r"""
options:
  login_host:
    description:
      - Host name or address of the server, or the folder of its unix socket.
      - There is no default, so that a forgotten C(module_defaults) never reaches another server.
    type: str
    required: true
  login_port:
    description: TCP port of the server, or the number in the name of its unix socket.
    type: int
    default: 5432
  login_user:
    description: Role to connect as.
    type: str
    required: true
  login_password:
    description:
      - Password of O(login_user).
      - Client programs get it through a private password file, never through their arguments or environment.
    type: str
    default: ''
  ssl_mode:
    description: How far TLS is demanded and checked, as libpq's C(sslmode).
    type: str
    choices: [disable, allow, prefer, require, verify-ca, verify-full]
    default: prefer
  ca_cert:
    description: File with the certificate authorities that may have signed the server's certificate.
    type: path
  ssl_cert:
    description: File with the client's certificate.
    type: path
  ssl_key:
    description: File with the client's private key.
    type: path
  connect_params:
    description: Further libpq connection parameters. They take precedence.
    type: dict
    default: {}
requirements:
  - psycopg >= 3.1 on the host where the module runs
notes:
  - Needs a direct connection. A pooler between module and server is refused,
    because locks and session settings are not kept by it.
"""

    DATABASE = r"""
options:
  login_db:
    description: Name of the database that the module works on.
    type: str
    required: true
"""
