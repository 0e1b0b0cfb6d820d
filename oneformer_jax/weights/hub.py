"""Models of the Hugging Face hub, by its own client: fetched into its cache, and pushed."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from absl import logging

from oneformer_jax.files import FileError
from oneformer_jax.weights import download, files

CARD = "README.md"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token of yours"


class NotOnHub(FileError):
    """The hub has no such model, or does not show it to this user."""


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
    """Gives the folder of a model in the cache of the hub's client, fetched if need be.

    Only config.json, our own description and the weights come: the first of `files.WEIGHTS`, with
    the shards that an index names. What the hub tells as SHA-256 is compared.

    Args:
      name: OWNER/NAME.
      revision: a branch, a tag or a commit; None is main.

    Raises:
      NotOnHub: there is no such model, or it is private.
      FileError: no network, a gated model, no such revision, no weights, or other content.
    """
    client = _client()
    errors = client.errors
    local = download.offline()
    with _reporting(client, name, revision):
        try:
            config = _file(client, name, files.CONFIG, revision, local)
        except errors.RemoteEntryNotFoundError:
            raise FileError(
                f"{name} on the hub has no {files.CONFIG}, so it is no model of transformers; for "
                f"a single file of it give {client.constants.ENDPOINT}/{name}/resolve/main/FILE"
            ) from None
        commit = config.parent.name  # all files are of one commit, even if a new one comes now
        with contextlib.suppress(errors.EntryNotFoundError):
            _file(client, name, f"{files.OWN_KEY}.json", commit, local)
        unknown: Exception | None = None
        for weights in files.WEIGHTS:
            try:
                found = _file(client, name, weights, commit, local)
            except errors.LocalEntryNotFoundError as error:
                # From now on the cache only: the hub did not say that it has no such file.
                local, unknown = True, unknown or error
            except errors.RemoteEntryNotFoundError:
                continue
            else:
                break
        else:
            if unknown is not None:
                raise unknown
            raise FileError(f"{name} on the hub has none of {', '.join(files.WEIGHTS)}")
        if weights.endswith(".json"):
            for shard in files.read_index(found):
                _file(client, name, shard, commit, local)
    return config.parent


def _file(client: Any, name: str, file: str, revision: str | None, local: bool) -> pathlib.Path:
    """A file of a model in the cache; what has just come is compared with the hub's SHA-256."""
    known = client.try_to_load_from_cache(name, file, revision=revision)
    found = client.hf_hub_download(name, file, revision=revision, local_files_only=local)
    path = pathlib.Path(found)
    if found == known:
        return path
    blob = path.resolve()
    with open(blob, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    # The cache calls a large file by the SHA-256 that the hub told.
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise FileError(
            f"{name}: {file} has SHA-256 {digest}, but the hub says {blob.name}; it is not kept. "
            "Fetch it again"
        )
    size = f"{blob.stat().st_size:,}"
    logging.info("%s: %s has %s bytes, SHA-256 %s", name, file, size, digest)
    return path


def check_login(name: str) -> None:
    """Asks the hub who the user is, before much is computed for `push`.

    Raises:
      FileError: nobody, or the hub cannot be reached; or `name` is no name of a model.
    """
    client = _client()
    if download.offline():
        raise FileError("--push needs the hub, but HF_HUB_OFFLINE forbids the network")
    with _reporting(client, name, None):
        client.utils.validate_repo_id(name)
        if client.get_token() is None:
            raise FileError(f"--push={name} needs a token of the hub: {_LOGIN}")
        client.HfApi().whoami()


def push(folder: pathlib.Path, name: str, card: str) -> str:
    """Pushes the files of a folder and a model card to the hub, in one commit.

    A new model is private until its owner opens it, since publishing cannot be undone; one that
    exists stays as it is, and keeps its card.

    Args:
      folder: from `files.save_hugging_face`.
      name: NAME or OWNER/NAME.
      card: README.md, in which {name} is replaced by OWNER/NAME.

    Returns:
      A sentence with the address, the visibility and the way to change it.

    Raises:
      FileError: the hub refuses it, or cannot be reached.
    """
    client = _client()
    api = client.HfApi()
    with _reporting(client, name, None):
        model = api.create_repo(name, private=True, exist_ok=True).repo_id
        private = api.model_info(model).private
        files_of = {path.name: path for path in sorted(folder.iterdir())}
        kept = api.file_exists(model, CARD)
        content: dict[str, Any] = (
            files_of if kept else files_of | {CARD: card.replace("{name}", model).encode()}
        )
        api.create_commit(
            model,
            [
                client.CommitOperationAdd(path_in_repo=file, path_or_fileobj=value)
                for file, value in content.items()
            ],
            commit_message="Weights of OneFormer-JAX",
        )
    address = f"{client.constants.ENDPOINT}/{model}"
    seen = (
        f"private: only you see it, until you open it at {address}/settings"
        if private
        else "public: everybody sees it"
    )
    card_kept = f"; its {CARD} was there and is kept" if kept else ""
    return f"{model} is pushed to {address} and is {seen}{card_kept}"


# ------------------------------------------------------------------ the client and its errors


def _client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise FileError(
            'the hub needs a package that is not installed: pip install "oneformer-jax[hub]"; or '
            "give the path of a file or folder that is there"
        ) from error
    return huggingface_hub


def _unreachable(error: Exception) -> str:
    if download.offline():
        return "it is not in the cache of the hub, and HF_HUB_OFFLINE forbids the network"
    reason = type(error.__cause__ or error).__name__
    return (
        "it is neither a path that is there nor in the hub's cache, and the hub does not answer as "
        f"it should ({reason})"
    )


@contextlib.contextmanager
def _reporting(client: Any, name: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors, which have many lines, into one line."""
    errors = client.errors
    address = f"{client.constants.ENDPOINT}/{name}"
    try:
        yield
    except FileError:
        raise
    except errors.GatedRepoError as error:
        raise FileError(f"{name} is gated: accept its terms at {address}, then {_LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise NotOnHub(
            f"{name}: the hub has no such model, or it is private; for that {_LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{name} on the hub has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileError(f"{name}: {_unreachable(error)}") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        login = f"; {_LOGIN}" if code in (401, 403) else ""
        said = f" ({_line(error.server_message)})" if error.server_message else ""
        raise FileError(f"{name}: the hub answers HTTP {code}{said}{login}") from error
    except errors.HFValidationError as error:
        raise FileError(f"{name!r} is no name of a model on the hub: {_line(error)}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise FileError(f"{name}: the hub does not answer ({type(error).__name__})") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"{name}: {_line(error)}") from error


def _line(error: object) -> str:
    """The words of an error in one line."""
    return " ".join(str(error).split())[:300]
