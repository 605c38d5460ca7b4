#!/usr/bin/python
# Copyright: (c) 2026, the Settler runbook contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Copy a backup off the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_copy
short_description: Copy a backup off the host with rclone, and compare the copy with it
version_added: 0.1.0
description:
  - Copies the files of a backup to C(<place>/<database>/<run id>/), compares their checksums there, and only then
    copies the manifest and reads it back. What has no manifest is no copy; a run that was killed is completed.
  - What a restore drill has written beside this or an earlier backup since it was copied is copied then.
  - Then removes copies of the same database, environment and server that the rule of retention does not keep. What
    has no mark of this module, or other files beside it, is left alone.
  - All places are tried. No secret is an argument or in the environment of C(rclone); the variables C(RCLONE_*) and
    C(AWS_*) are kept from it, so that its configuration alone says how a place is reached.
options:
  src:
    description: Folder of the backup, as RV(settler.runbook.backup#module:path).
    type: path
    required: true
  places:
    description: Where to copy to - C(remote:path) with a remote of rclone's configuration, or the absolute path of a
      folder, which must exist.
    type: list
    elements: str
    required: true
  rclone_config:
    description: Path of rclone's configuration, with mode 0600. Only folders of the host can do without.
    type: path
  verify:
    description:
      - With V(checksum) the place is asked for its checksums, or read back if it has none that fit.
      - With V(download) every byte is read back.
    type: str
    choices: [checksum, download]
    default: checksum
  required:
    description: Whether a copy that could not be made is a failure; otherwise it is a warning.
    type: bool
    default: true
  keep:
    description: So many of the newest copies stay in each place; V(0) is no rule.
    type: int
    default: 7
  keep_days:
    description: Copies of backups that are younger than so many days stay; V(0) is no rule. Without any rule all stay.
    type: float
    default: 0.0
attributes:
  check_mode:
    description: In check mode the module looks at the places, says what it would copy, and writes nothing.
    support: full
  diff_mode:
    description: Returns what it changes as C(before) and C(after).
    support: full
  idempotent:
    description: A second run compares again and changes nothing.
    support: full
requirements:
  - rclone on the host where the module runs
seealso:
  - module: settler.runbook.backup
  - module: settler.runbook.backup_fetch
author:
  - The Settler database team (@settler)
"""

EXAMPLES = r"""
- name: Copy the backup off the host
  settler.runbook.backup_copy:
    src: "{{ backup_result.path }}"
    places: ["offsite:settler-backups/prod", /mnt/second]
    rclone_config: /etc/settler/rclone.conf
"""

RETURN = r"""
copies:
  description: What came of each place.
  returned: always
  type: list
  elements: dict
  contains:
    place:
      description: The place.
      type: str
      returned: always
    sent:
      description: Whether the copy was not there yet.
      type: bool
      returned: always
    verified:
      description: How it was compared, V(checksum) or V(download); empty in check mode and after a failure.
      type: str
      returned: always
    bytes:
      description: Size of the copy.
      type: int
      returned: always
    proven:
      description: Run ids of copies that were given what a restore drill has written beside their backups since.
      type: list
      elements: str
      returned: always
    pruned:
      description: Older copies that were removed.
      type: list
      elements: str
      returned: always
    error:
      description: Why there is no proven copy; empty if there is one.
      type: str
      returned: always
"""

import dataclasses
import typing as t
from pathlib import Path

from ansible_collections.settler.runbook.plugins.module_utils._errors import RunbookError
from ansible_collections.settler.runbook.plugins.module_utils._module import run_module
from ansible_collections.settler.runbook.plugins.module_utils._offsite import Copy, Rule, copy_all

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

ARGUMENTS: dict[str, t.Any] = {
    "src": {"type": "path", "required": True},
    "places": {"type": "list", "elements": "str", "required": True},
    "rclone_config": {"type": "path"},
    "verify": {"type": "str", "default": "checksum", "choices": ["checksum", "download"]},
    "required": {"type": "bool", "default": True},
    "keep": {"type": "int", "default": 7},
    "keep_days": {"type": "float", "default": 0.0},
}


def told(folder: str, failed: list[Copy]) -> RunbookError:
    """Return the error about places without a copy."""
    lines = [f"  {copy.place}: " + copy.error.replace("\n", "\n    ") for copy in failed]
    return RunbookError(
        f"{len(failed)} of the copies of {folder} could not be made or proven\n"
        + "\n".join(lines)
        + "\n  the backup itself is whole and stays where it is; copies begun are completed by the next run",
        hint="Mend the cause and run again; with -e backup_copy_required=false a copy that fails is a warning only.",
    )


def work(module: AnsibleModule) -> dict[str, t.Any]:
    """Copy to all places; a place without a copy is a failure or a warning."""
    params = module.params
    config = Path(params["rclone_config"]) if params["rclone_config"] else None
    rule = Rule(params["verify"] == "download", params["keep"], params["keep_days"])
    copies = copy_all(Path(params["src"]), params["places"], config, rule, check=module.check_mode)
    rows = [dataclasses.asdict(copy) for copy in copies]
    failed = [copy for copy in copies if copy.error]
    if failed:
        error = told(params["src"], failed)
        if params["required"] and not module.check_mode:
            error.facts["copies"] = rows
            raise error
        module.warn(error.message)
    sent = [copy.place for copy in copies if copy.sent]
    pruned = [path for copy in copies for path in copy.pruned]
    return {
        "changed": bool(sent or pruned or any(copy.proven for copy in copies)),
        "copies": rows,
        "diff": {"before": "".join(f"{path}\n" for path in pruned), "after": "".join(f"{place}\n" for place in sent)},
    }


def main() -> None:
    """Run the module."""
    run_module(work, ARGUMENTS)


if __name__ == "__main__":
    main()
