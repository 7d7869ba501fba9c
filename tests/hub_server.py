"""A stand-in of the Hugging Face hub on loopback: codecs in and out."""

import base64
import hashlib
import http.server
import json
import re
import urllib.parse


class HubServer(http.server.ThreadingHTTPServer):
  """Keeps `repos`: name to a list of commits, each files by name."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repos, self.private, self.asked = {}, {}, []

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, *_):
    pass  # A client that hung up.


def commit_id(index: int) -> str:
  return hashlib.sha1(str(index).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def _answer(self, status, body=b"", headers=None):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {"Content-Length": len(body), **(headers or {})}.items():
      self.send_header(name, str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def _refuse(self, code):
    status = {"RepoNotFound": 401}.get(code, 404)
    self._answer(status, {"error": code}, {"X-Error-Code": code})

  def do_GET(self):  # noqa: N802
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    self.server.asked.append((self.command, path))
    if path == "/api/whoami-v2":
      if "Authorization" not in self.headers:
        return self._answer(401, {"error": "no token"})
      return self._answer(200, {"name": "me", "type": "user"})
    found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    commits = found and self.server.repos.get(found[1])
    if commits is None:
      return self._refuse("RepoNotFound")
    ids = {commit_id(i): i for i in range(len(commits))}
    index = {**ids, "main": len(commits) - 1}.get(found[2])
    if index is None:
      return self._refuse("RevisionNotFound")
    data = commits[index].get(found[3])
    if data is None:
      return self._refuse("EntryNotFound")
    etag = hashlib.sha1(data).hexdigest()
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit_id(index)}
    return self._answer(200, data, headers)

  do_HEAD = do_GET  # noqa: N815

  def do_POST(self):  # noqa: N802
    path = urllib.parse.urlsplit(self.path).path
    self.server.asked.append((self.command, path))
    data = self.rfile.read(int(self.headers["Content-Length"]))
    if path == "/api/validate-yaml":
      return self._answer(200, {"errors": [], "warnings": []})
    if path == "/api/repos/create":
      asked = json.loads(data)
      name = f"{asked['organization']}/{asked['name']}"
      if name not in self.server.repos:
        self.server.repos[name] = [{}]
        self.server.private[name] = asked.get("visibility") == "private"
      return self._answer(200, {"url": f"{self.server.url}/{name}"})
    repo, action = re.fullmatch(
      r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path
    ).groups()
    if action == "preupload":
      names = [each["path"] for each in json.loads(data)["files"]]
      about = {"uploadMode": "regular", "shouldIgnore": False}
      return self._answer(200, {"files": [{"path": n, **about} for n in names]})
    commits = self.server.repos[repo]
    new = dict(commits[-1])
    for line in map(json.loads, data.splitlines()):
      if line["key"] == "file":
        value = line["value"]
        new[value["path"]] = base64.b64decode(value["content"])
    commits.append(new)
    oid = commit_id(len(commits) - 1)
    url = f"{self.server.url}/{repo}/commit/{oid}"
    return self._answer(200, {"commitUrl": url, "commitOid": oid})
