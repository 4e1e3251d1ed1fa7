"""Which journal SQLite can use where: WAL needs shared memory, which network file systems do not have."""

import re
from pathlib import Path

_NETWORK = re.compile(
    r"nfs\d*|cifs|smb\w*|ceph|lustre|gpfs|beegfs\w*|pvfs2|orangefs|panfs|gfs2|ocfs2|afs|ncpfs|coda|9p|virtiofs|vboxsf|prl_fs"
    r"|fuse|fuse\..*"
)


def journal_mode(directory: Path, mountinfo: str | None = None) -> str:
    """`DELETE` where `directory` lies on a network (or FUSE) file system, `WAL` elsewhere.

    Args:
        directory: An existing directory.
        mountinfo: The text of `/proc/self/mountinfo`, read if not given. Where there is none, `WAL`.
    """
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        except OSError:
            return "WAL"
    kind = _file_system(directory.resolve(), mountinfo)
    return "DELETE" if _NETWORK.fullmatch(kind) else "WAL"


def _file_system(directory: Path, mountinfo: str) -> str:
    """Type of the file system of the innermost mount that holds `directory`; of two in one place, the last covers."""
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        mount, separator, source = line.partition(" - ")
        fields = mount.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = Path(_unescape(fields[4]))
        if directory.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), source.split(" ")[0]
    return kind


def _unescape(text: str) -> str:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
