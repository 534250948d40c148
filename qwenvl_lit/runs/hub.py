"""Uploads an exported folder to a repository of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from qwenvl_lit.data.download.files import format_bytes
from qwenvl_lit.terminal import counted, printable
from qwenvl_lit.types import DataError

# The first base class is the error of the HTTP client, httpx or httpx2. hf_xet, which uploads
# large files, raises RuntimeError. An invalid model card is a ValueError.
UPLOAD_ERRORS = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)
MAY_WRITE = "repo.write"  # permission of a fine-grained token


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A model repository on the Hub that the token of the user may write to, or may create.

    Args:
        name: `owner/name`.
        private: whether others cannot see it.
        files: the names of its files, or None if it does not exist.
    """

    name: str
    private: bool
    files: frozenset[str] | None

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.name}"

    def announcement(self, folder: Path) -> str:
        """Returns what `upload` will do, with the name and the size of each file."""
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        visibility = "private" if self.private else "public"
        state = "new" if self.files is None else "exists"
        count = counted(len(sizes), "file")
        total = format_bytes(sum(sizes.values()))
        lines = [f"Uploading to {self.url} ({state}, {visibility}): {count}, {total}"]
        known = self.files or frozenset()
        for name, size in sizes.items():
            note = "  (replaces)" if name in known else ""
            lines.append(f"  {printable(name)}  {format_bytes(size)}{note}")
        if kept := sorted(known - sizes.keys() - {".gitattributes"}):
            lines.append(f"  kept in the repository: {printable(', '.join(kept))}")
        lines.append(f"To repeat it after an interruption:  {self.repeat(folder)}")
        return "\n".join(lines)

    def repeat(self, folder: Path) -> str:
        """Returns the command that uploads the folder again; what has arrived is not sent again."""
        private = " --private" if self.private else ""
        return f"hf upload {self.name} {folder} .{private}"

    def upload(self, folder: Path) -> None:
        """Creates the repository if it does not exist, and uploads all files of a folder.

        Raises:
            DataError: the Hub refuses, or the connection breaks. The folder stays as it is.
        """
        api = HfApi(library_name="qwenvl_lit")
        try:
            if self.files is None:
                api.create_repo(self.name, private=self.private, exist_ok=True)
            api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=f"Upload {folder.name}"
            )
        except UPLOAD_ERRORS as error:
            raise DataError(
                f"push={self.name}: the upload stopped: {_one_line(error)}; the export is complete "
                f"in {folder}, and this repeats the upload:  {self.repeat(folder)}"
            ) from error


def find_repository(name: str, *, private: bool) -> Repository:
    """Asks the Hub about a repository, without changing it.

    Args:
        private: whether the repository is to be private. One that exists must already be so.

    Raises:
        DataError: the name is not valid, offline mode is on, the Hub cannot be reached, or the
            token is missing, not valid, or may not write there.
    """
    _check_name(name)
    if constants.is_offline_mode():
        raise DataError(
            f"push={name} needs the network, and offline mode is on (HF_HUB_OFFLINE): unset it, or "
            f"leave out push= and upload the folder later with hf upload"
        )
    if get_token() is None:
        raise DataError(
            f"push={name} needs a token that may write: run hf auth login, or set HF_TOKEN "
            f"({constants.ENDPOINT}/settings/tokens makes one)"
        )
    api = HfApi(library_name="qwenvl_lit")
    try:
        _check_account(name, api.whoami())
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return Repository(name=name, private=private, files=None)
        api.auth_check(name, write=True)
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise DataError(f"push={name}: {constants.ENDPOINT} refuses: {_one_line(error)}") from error
    except HfHubHTTPError.__bases__ as error:
        raise DataError(
            f"push={name}: no network: {constants.ENDPOINT} cannot be reached "
            f"({_one_line(error)}); check the connection or a proxy"
        ) from error
    if bool(found.private) != private:
        visibility, other = ("private", "true") if found.private else ("public", "false")
        raise DataError(
            f"push={name}: the repository exists and is {visibility}: choose another name, or "
            f"push_private={other} to upload to it as it is"
        )
    files = frozenset(file.rfilename for file in found.siblings or ())
    return Repository(name=name, private=private, files=files)


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise DataError(
            f"push is owner/name, a repository on the Hugging Face Hub, got {name!r}; names have "
            f"letters, digits, '-', '_' and '.'"
        )


def _check_account(name: str, account: Mapping[str, Any]) -> None:
    """Raises a DataError if the account of a token cannot write to the repository `name`.

    Args:
        account: the answer of the Hub to "who am I".
    """
    owner, user = name.partition("/")[0].casefold(), str(account.get("name"))
    organizations = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or ()}
    roles = {member.casefold(): role for member, role in organizations.items()}
    if owner not in (user.casefold(), *roles):
        owners = ", ".join([user, *organizations])
        raise DataError(
            f"push={name}: the token is of {user}, who may write to repositories of {owners}; "
            f"choose one of these owners, or another token"
        )
    if roles.get(owner) == "read":
        raise DataError(f"push={name}: {user} may only read in this organization")
    token = (account.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    granted = {permission for scope in scopes for permission in scope.get("permissions", ())}
    fine_grained = token.get("role") == "fineGrained"
    if token.get("role") == "read" or (fine_grained and MAY_WRITE not in granted):
        raise DataError(
            f"push={name}: the token may only read; make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, then run hf auth login or set HF_TOKEN"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
