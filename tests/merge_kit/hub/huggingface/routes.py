"""What the tests' Hugging Face Hub answers, as the real one does: paths, codes, bodies, headers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from tests.merge_kit.hub.huggingface.repos import Blob, Refused

if TYPE_CHECKING:
    from tests.merge_kit.hub.huggingface.server import HubServer

Handler = Callable[..., Awaitable[Response]]
ROUTES: dict[tuple[str, str], Handler] = {}
ID, REV = r"([\w.-]+/[\w.-]+)", r"([^/]+)"


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    def keep(handler: Handler) -> Handler:
        ROUTES[method, pattern] = handler
        return handler

    return keep


@route("GET", "/api/whoami-v2")
async def whoami(hub: HubServer, request: Request) -> Response:
    return JSONResponse({"type": "user", "name": hub.user(request), "orgs": []})


@route("GET", "/api/agent-harnesses")
async def harnesses(hub: HubServer, request: Request) -> Response:
    return JSONResponse({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
async def validate(hub: HubServer, request: Request) -> Response:
    return JSONResponse({"errors": [], "warnings": []})


@route("POST", "/api/repos/create")
async def create(hub: HubServer, request: Request) -> Response:
    asked, user = await request.json(), hub.user(request)
    owner = asked.get("organization") or user
    name = f"{owner}/{asked['name']}"
    if user is None:
        raise Refused(401, "Invalid username or password.")
    if name in hub.repos:
        url = f"{hub.url}/{name}"
        message = "You already created this model repo"
        return JSONResponse({"error": message, "url": url}, 409, {"X-Error-Message": message})
    if owner not in (user, f"{user}-org"):
        raise Refused(403, f'You don\'t have the rights to create a model under "{owner}"')
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.create(name, writers=user, private=private)
    return JSONResponse({"url": f"{hub.url}/{name}", "name": name})


@route("GET", "/api/models")
async def models(hub: HubServer, request: Request) -> Response:
    wanted, user = set(request.query_params.getlist("filter")), hub.user(request)
    found = [
        {"id": repo.name, "modelId": repo.name, "private": repo.private, "tags": repo.tags}
        for repo in hub.repos.values()
        if wanted <= set(repo.tags) and (not repo.private or user in repo.writers | repo.readers)
    ]
    return JSONResponse(found)


@route("GET", f"/api/models/{ID}")
async def model(hub: HubServer, request: Request, name: str) -> Response:
    return await model_at(hub, request, name, "main")


@route("GET", f"/api/models/{ID}/revision/{REV}")
async def model_at(hub: HubServer, request: Request, name: str, revision: str) -> Response:
    repo = hub.repo(request, name)
    oid, files = hub.at(repo, revision)
    told: dict[str, object] = {"_id": name, "id": name, "modelId": name, "sha": oid,
            "private": repo.private, "tags": repo.tags, "cardData": repo.card,
            "siblings": [{"rfilename": path} for path in sorted(files)]}  # fmt: skip
    only = request.query_params.getlist("expand")
    return JSONResponse({k: v for k, v in told.items() if not only or k in ("_id", "id", *only)})


@route("GET", f"/api/models/{ID}/tree/{REV}")
async def tree(hub: HubServer, request: Request, name: str, revision: str) -> Response:
    return await tree_below(hub, request, name, revision, "")


@route("GET", f"/api/models/{ID}/tree/{REV}/(.+)")
async def tree_below(
    hub: HubServer, request: Request, name: str, revision: str, folder: str
) -> Response:
    _, files = hub.at(hub.repo(request, name), revision)
    prefix = f"{folder}/" if folder else ""
    below = {path: blob for path, blob in files.items() if path.startswith(prefix)}
    if prefix and not below:
        raise Refused(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    rows: dict[str, dict[str, object]] = {}
    for path, blob in sorted(below.items()):
        steps = path[len(prefix) :].split("/")
        for depth in range(1, len(steps)):
            place = prefix + "/".join(steps[:depth])
            rows[place] = {"type": "directory", "path": place, "size": 0, "oid": "0" * 40}
        rows[path] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
        if blob.sha256:
            lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
            rows[path] |= {"lfs": lfs}
    deep = request.query_params.get("recursive", "").lower() == "true"
    listed = [row for path, row in sorted(rows.items()) if deep or "/" not in path[len(prefix) :]]
    start = int(request.query_params.get("cursor", 0))
    page, end = listed[start : start + hub.page_size], start + hub.page_size
    headers = {}
    if end < len(listed):
        url = request.url.include_query_params(cursor=end)
        root = hub.upload_root or f"http://{hub.host}:{hub.port}"
        headers["Link"] = f'<{root}{url.path}?{url.query}>; rel="next"'
    return JSONResponse(page, headers=headers)


@route("GET", f"/api/models/{ID}/commits/{REV}")
async def commits(hub: HubServer, request: Request, name: str, revision: str) -> Response:
    repo = hub.repo(request, name)
    oid: str | None = hub.at(repo, revision)[0]
    rows: list[dict[str, object]] = []
    while oid:
        commit = repo.commits[oid]
        rows.append({"id": oid, "title": commit.title, "message": "", "authors": [],
                     "date": "2026-11-23T12:00:00.000Z"})  # fmt: skip
        oid = commit.parent
    start = int(request.query_params.get("p", 0)) * 50
    headers = {}
    if start + 50 < len(rows):
        url = request.url.include_query_params(p=start // 50 + 1)
        root = f"http://{hub.host}:{hub.port}"
        headers["Link"] = f'<{root}{url.path}?{url.query}>; rel="next"'
    return JSONResponse(rows[start : start + 50], headers=headers)


@route("POST", f"/api/models/{ID}/preupload/{REV}")
async def preupload(hub: HubServer, request: Request, name: str, revision: str) -> Response:
    proposed = request.query_params.get("create_pr") == "1"
    repo = hub.repo(request, name, write=not proposed)
    _, files = hub.at(repo, revision)
    ignored = files.get(".gitignore", Blob(b"")).data.decode().split()
    told = []
    for file in (await request.json())["files"]:
        path, there = file["path"], files.get(file["path"])
        large = path.endswith((".safetensors", ".bin")) or file["size"] > 10_000_000
        oid = (there.sha256 or there.oid) if there else None
        skip = any(path.endswith(end.lstrip("*")) for end in ignored)
        told.append({"path": path, "uploadMode": "lfs" if large else "regular",
                     "shouldIgnore": skip, "oid": oid})  # fmt: skip
    return JSONResponse({"files": told})


@route("POST", f"/{ID}\\.git/info/lfs/objects/batch")
async def batch(hub: HubServer, request: Request, name: str) -> Response:
    asked = await request.json()
    hub.repo(request, name, write="ref" in asked)  # without one it is for a pull request
    root = hub.upload_root or hub.url
    told = []
    for one in asked["objects"]:
        oid, size = one["oid"], one["size"]
        answer: dict[str, object] = {"oid": oid, "size": size}
        if oid not in hub.objects:
            upload: dict[str, object] = {"href": f"{root}/lfs/{oid}?X-Signature=upload-secret"}
            if size > hub.part_size:
                count = -(-size // hub.part_size)
                numbered = {str(n): f"{root}/lfs/{oid}/{n}?X-Signature=upload-secret"
                            for n in range(1, count + 1)}  # fmt: skip
                upload = {"href": f"{root}/lfs/{oid}/done",
                          "header": {"chunk_size": str(hub.part_size), **numbered}}  # fmt: skip
            verify = {"href": f"{root}/{name}.git/info/lfs/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        told.append(answer)
    return JSONResponse({"transfer": "basic", "objects": told})


@route("PUT", "/lfs/([0-9a-f]{64})")
async def put(hub: HubServer, request: Request, oid: str) -> Response:
    data = await request.body()
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, "the digest is another one")
    hub.objects[oid] = data
    return Response(headers={"ETag": f'"{oid}"'})


@route("PUT", "/lfs/([0-9a-f]{64})/([0-9]+)")
async def put_part(hub: HubServer, request: Request, oid: str, number: str) -> Response:
    hub.parts[oid, int(number)] = await request.body()
    return Response(headers={"ETag": f'"{oid}-{number}"'})


@route("POST", "/lfs/([0-9a-f]{64})/done")
async def put_together(hub: HubServer, request: Request, oid: str) -> Response:
    numbers = [part["partNumber"] for part in (await request.json())["parts"]]
    data = b"".join(hub.parts.pop((oid, number)) for number in numbers)
    if hashlib.sha256(data).hexdigest() != oid:
        raise Refused(400, "the digest is another one")
    hub.objects[oid] = data
    return JSONResponse({})


@route("POST", f"/{ID}\\.git/info/lfs/verify")
async def verify(hub: HubServer, request: Request, name: str) -> Response:
    asked = await request.json()
    if len(hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "the object is not there")
    return JSONResponse({})


@route("POST", f"/api/models/{ID}/commit/{REV}")
async def commit(hub: HubServer, request: Request, name: str, revision: str) -> Response:
    proposed = request.query_params.get("create_pr") == "1"
    body = await request.body()
    lines = [json.loads(line) for line in body.splitlines()]
    repo, user = hub.repo(request, name, write=not proposed), str(hub.user(request))
    head, before = hub.at(repo, revision)
    header, files = lines[0]["value"], dict(before)
    parent = header.get("parentCommit")
    if parent not in (None, head) and not proposed:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        value = line["value"]
        path = value["path"]
        if {"", ".", ".."} & {*path.split("/")}:
            raise Refused(400, f"Invalid path: {path}")
        if line["key"] == "file":
            files[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(hub.objects[value["oid"]], value["oid"])
        elif line["key"] != "deletedFile":
            raise Refused(400, f"Invalid operation: {line['key']}")
        elif path in files:
            del files[path]
        else:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    ref, number = revision, len(repo.pulls) + 1
    if proposed:
        ref = f"refs/pr/{number}"
        repo.refs[ref] = parent or head
        told = {"num": number, "title": header["summary"], "author": {"name": user},
                "createdAt": "2026-11-23T12:00:00.000Z", "status": "open",
                "isPullRequest": True, "repo": {"name": name, "type": "model"}}  # fmt: skip
        repo.pulls.append(told)
    oid = repo.add(ref, files, header["summary"], user)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}
    if proposed:
        answer["pullRequestUrl"] = f"{hub.url}/{name}/discussions/{number}"
    return JSONResponse(answer)


@route("GET", f"/api/models/{ID}/discussions")
async def discussions(hub: HubServer, request: Request, name: str) -> Response:
    repo, status = hub.repo(request, name), request.query_params.get("status")
    found = [pull for pull in repo.pulls if status in (None, "all", pull["status"])]
    start = int(request.query_params.get("p", 0)) * 10
    return JSONResponse({"discussions": found[start : start + 10], "count": len(found),
                         "start": start})  # fmt: skip


@route("POST", f"/api/models/{ID}/discussions/([0-9]+)/merge")
async def merge(hub: HubServer, request: Request, name: str, number: str) -> Response:
    repo, ref = hub.repo(request, name, write=True), f"refs/pr/{number}"
    pull = repo.pulls[int(number) - 1]
    tip = repo.commits[repo.refs[ref]]
    old = repo.files(str(tip.parent))
    changed = {path: blob for path, blob in tip.files.items() if old.get(path) != blob}
    repo.add("main", {**repo.files(), **changed}, str(pull["title"]), str(hub.user(request)))
    pull["status"] = "merged"
    return JSONResponse({})


async def resolve(
    hub: HubServer, request: Request, name: str, revision: str, path: str
) -> Response:
    oid, files = hub.at(hub.repo(request, name), revision)
    blob = files.get(path)
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 or blob.oid}"',
               "Accept-Ranges": "bytes"}  # fmt: skip
    if blob.sha256:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        if hub.upload_root:  # large files come from a storage elsewhere
            return RedirectResponse(f"{hub.upload_root}/cdn/{blob.sha256}", 302, headers)
    return (
        Response(blob.data, headers=headers) if hub.whole else ranged(request, blob.data, headers)
    )


for _method in ("GET", "HEAD"):
    route(_method, f"/{ID}/resolve/{REV}/(.+)")(resolve)


def ranged(request: Request, data: bytes, headers: Mapping[str, str]) -> Response:
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not found:
        return Response(data, headers=dict(headers))
    start, end = int(found[1]), int(found[2] or len(data) - 1)
    if start >= len(data):
        raise Refused(416, "Range not satisfiable")
    shown = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
    return Response(data[start : end + 1], 206, shown)


@route("GET", "/cdn/([0-9a-f]{64})")
async def cdn(hub: HubServer, request: Request, oid: str) -> Response:
    return ranged(request, hub.objects[oid], {})
