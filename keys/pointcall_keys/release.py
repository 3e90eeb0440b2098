"""A release: a signed manifest with bundles, files and provenance, as one OCI artifact. Bytes or folder <-> Release.

The artifact is an OCI image manifest v1.1 with an artifact type, the empty config and one layer a file, each titled
with its subject name. Its digest pins every byte. That the parts are signed is for `pointcall_attest.admission` to say.
Spec: OCI image-spec v1.1; Sigstore bundle media type; docs/spec/release.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from pointcall_attest import exact_json
from pointcall_attest.errors import MalformedError
from pointcall_attest.model import FileName, Strict, validated
from pointcall_keys.errors import KeysError

ARTIFACT_TYPE: Final = "application/vnd.pointcall.manifest.v1"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
STATEMENT_TYPE: Final = "application/vnd.in-toto+json"
BUNDLE_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
FILE_TYPES: Final[Mapping[str, str]] = {
    ".wasm": "application/wasm",
    ".blob": "application/vnd.pointcall.bpf.v1",
    ".json": "application/json",
}
OTHER_TYPE: Final = "application/octet-stream"
TITLE: Final = "org.opencontainers.image.title"
EMPTY: Final = b"{}"
MAX_MANIFEST_BYTES: Final = 512 * 1024
MAX_LAYER_BYTES: Final = 16 * 1024 * 1024
MAX_TOTAL_BYTES: Final = 64 * 1024 * 1024  # of all layers together
MAX_BUNDLES: Final = 8
PROVENANCE: Final = "provenance/"  # statements about single modules and their bundles, for reviewers

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Fetch = Callable[[str, int], bytes]


class _Oci(Strict):
    model_config = ConfigDict(alias_generator=to_camel)


class Descriptor(_Oci):
    """What OCI says of one blob."""

    media_type: Annotated[str, Field(max_length=255)]
    digest: Digest
    size: Annotated[int, Field(ge=0, le=MAX_LAYER_BYTES)]
    annotations: Annotated[dict[str, str], Field(default_factory=dict, max_length=8)]


class _Image(_Oci):
    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: Literal["application/vnd.pointcall.manifest.v1"]
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], Field(min_length=1, max_length=1200)]
    annotations: Annotated[dict[str, str], Field(default_factory=dict, max_length=16)]


@dataclass(frozen=True, slots=True)
class Release:
    """The parts, as bytes. Nothing of them has been verified."""

    statement: bytes
    bundles: tuple[bytes, ...]
    files: Mapping[str, bytes]
    provenance: Mapping[str, bytes] = field(default_factory=dict)  # by file name, bundles as `*.sigstore.json`

    def encode(self) -> Encoded:
        """The OCI manifest and its blobs; the same release always gives the same bytes."""
        layers = [(STATEMENT_TYPE, "manifest.json", self.statement)]
        layers += [(BUNDLE_TYPE, f"bundle-{n}.sigstore.json", bundle) for n, bundle in enumerate(self.bundles)]
        layers += [(_type_of(name), f"files/{name}", self.files[name]) for name in sorted(self.files)]
        layers += [(_said(name), PROVENANCE + name, self.provenance[name]) for name in sorted(self.provenance)]
        image = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": EMPTY_TYPE, "digest": digest(EMPTY), "size": len(EMPTY)},
            "layers": [_descriptor(*layer) for layer in layers],
        }
        blobs = {digest(content): content for _, _, content in layers} | {digest(EMPTY): EMPTY}
        return Encoded(json.dumps(image, separators=(",", ":")).encode(), blobs)

    @classmethod
    def decode(cls, image: bytes, fetch: Fetch) -> Self:
        """The release of an OCI manifest; `fetch(digest, size)` gives a blob. MalformedError `release.form`.

        Every blob is compared with its digest and size, whatever `fetch` does; what it raises passes.
        """
        exact_json.loads(image, id="release.form", max_bytes=MAX_MANIFEST_BYTES, what="the OCI manifest")
        parsed = validated(_Image, image, id="release.form", what="a release")
        if sum(layer.size for layer in parsed.layers) > MAX_TOTAL_BYTES:
            raise MalformedError("the release is too large", id="release.form", want=f"<= {MAX_TOTAL_BYTES} bytes")
        titled = _titled(parsed)
        content = {title: _blob(layer, fetch) for title, layer in titled.items()}
        bundles = [content[t] for t, layer in titled.items() if _is_signature(t, layer)]
        files, beside = (
            {t.removeprefix(folder): content[t] for t in titled if t.startswith(folder)}
            for folder in ("files/", PROVENANCE)
        )
        return cls(content["manifest.json"], tuple(bundles), files, beside)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The release in a folder as `pointcall build` and `sign` leave it. KeysError `build.file`."""
        try:
            statement = (directory / "manifest.json").read_bytes()
            bundles = tuple(path.read_bytes() for path in sorted(directory.glob("*.sigstore.json")))
            files, beside = (_tree(directory / name) for name in ("files", "provenance"))
            return cls(statement, bundles, files, beside)
        except OSError as error:
            raise KeysError(
                "the release cannot be read", id="build.file", want=str(directory), got=str(error)
            ) from None

    def write(self, directory: Path) -> None:
        """The inverse of `read`, into a folder that is made, or is empty. KeysError `build.file` if it is not."""
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise KeysError("the folder is not empty", id="build.file", got=str(directory))
        named = {f"bundle-{n}.sigstore.json": bundle for n, bundle in enumerate(self.bundles)}
        named |= {"manifest.json": self.statement} | {f"files/{name}": self.files[name] for name in self.files}
        named |= {PROVENANCE + name: self.provenance[name] for name in self.provenance}
        for name, content in named.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An OCI manifest and every blob that it names, by digest."""

    image: bytes
    blobs: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """What to pull, and what a pointer names."""
        return digest(self.image)


def digest(data: bytes) -> str:
    """As OCI writes it: `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _tree(base: Path) -> dict[str, bytes]:
    """Every plain file below a folder, by its path there; none if there is no folder."""
    return {str(path.relative_to(base)): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}


def _said(name: str) -> str:
    return BUNDLE_TYPE if name.endswith(".sigstore.json") else STATEMENT_TYPE


def _is_signature(title: str, layer: Descriptor) -> bool:
    """Whether a layer is a signature of the manifest: its title names no folder."""
    return layer.media_type == BUNDLE_TYPE and "/" not in title


def _type_of(name: str) -> str:
    return next((kind for suffix, kind in FILE_TYPES.items() if name.endswith(suffix)), OTHER_TYPE)


def _descriptor(media_type: str, title: str, content: bytes) -> dict[str, Any]:
    row = {"mediaType": media_type, "digest": digest(content), "size": len(content)}
    return row | {"annotations": {TITLE: title}}


class _Title(Strict):
    name: FileName


def _titled(image: _Image) -> dict[str, Descriptor]:
    """Layers by title: one statement, bundles, files; nothing else, nothing twice."""
    titled: dict[str, Descriptor] = {}
    for layer in image.layers:
        title = layer.annotations.get(TITLE, "")
        validated(_Title, json.dumps({"name": title}).encode(), id="release.form", what="a title of a layer")
        known = title == "manifest.json" or title.startswith(("files/", PROVENANCE)) or _is_signature(title, layer)
        if title in titled or not known:
            raise MalformedError("a layer that a release does not have", id="release.form", got=title[:80])
        titled[title] = layer
    if "manifest.json" not in titled or sum(_is_signature(t, d) for t, d in titled.items()) > MAX_BUNDLES:
        raise MalformedError("a release has one manifest.json", id="release.form", want=f"and <= {MAX_BUNDLES} bundles")
    return titled


def _blob(layer: Descriptor, fetch: Fetch) -> bytes:
    content = fetch(layer.digest, layer.size)
    if len(content) != layer.size or digest(content) != layer.digest:
        raise MalformedError("a layer is not what the manifest says", id="release.digest", want=layer.digest)
    return content
