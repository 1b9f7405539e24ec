"""A Hugging Face Hub on loopback, in memory, for huggingface_hub's own client (written with 2.4).

It knows the requests that pushing and loading a model need; REV in their paths is a branch, a commit or `refs/pr/N`.
Files go up by git-LFS, since the client leaves the Xet protocol out with HF_HUB_DISABLE_XET=1.
"""
import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {'hf_writer': ('alice', 'write'), 'hf_reader': ('alice', 'read'), 'hf_other': ('bob', 'write')}
_REPO = r'(?P<repo>[^/]+/[^/]+)'
_REV = r'(?P<rev>[^/]+)'


@dataclass
class Repo:
    """A repository. A commit is its files by path."""
    private: bool = False
    refs: Dict[str, str] = field(default_factory=dict)
    commits: Dict[str, Dict[str, bytes]] = field(default_factory=dict)

    def commit(self, ref: str, files: Dict[str, bytes]) -> str:
        oid = hashlib.sha1(f'{len(self.commits)}'.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match."""
    request: str  # a pattern such as 'POST */commit/*'
    status: int = 0  # to answer with; 0 cuts the connection
    times: int = 1
    after: bool = False  # the request has its effect before the connection is cut
    corrupt: bool = False  # the last byte of the file is another


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = '', **content: Any) -> None:
        self.status, self.content = status, dict(error=message, **content)
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}


class HubServer(ThreadingHTTPServer):
    """The server. Tests look at its state, and change it."""
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.uploads: Dict[str, bytes] = {}  # by SHA-256
        self.faults: List[Fault] = []
        self.requests: List[str] = []

    def add_repo(self, repo_id: str, files: Optional[Dict[str, bytes]] = None, private: bool = False) -> Repo:
        """Make a repository with one commit."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit('main', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n', **(files or {})})
        return repo

    def files(self, repo_id: str, ref: str = 'main') -> Dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[ref]]

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # of connections that are cut
            super().handle_error(request, client_address)


def _file_oid(path: str, data: bytes) -> str:
    if path.endswith('.safetensors'):  # in git-LFS
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: HubServer
    routes: List[Tuple[str, str]] = [
        (r'POST /api/repos/create', 'create'),
        (r'POST /api/validate-yaml', 'validate_yaml'),
        (rf'GET /api/models/{_REPO}(/revision/{_REV})?', 'info'),
        (rf'POST /api/models/{_REPO}/branch/{_REV}', 'branch'),
        (rf'POST /api/models/{_REPO}/preupload/{_REV}', 'preupload'),
        (rf'POST /api/models/{_REPO}/commit/{_REV}', 'commit'),
        (rf'POST /{_REPO}\.git/info/lfs/objects/batch', 'lfs_batch'),
        (r'PUT /lfs/(?P<oid>[0-9a-f]{64})', 'lfs_put'),
        (rf'(HEAD|GET) /{_REPO}/resolve/{_REV}/(?P<path>.+)', 'resolve'),
    ]

    def log_message(self, *args) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.create_pr = 'create_pr' in url.query
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        request = f'{self.command} {url.path}'
        self.server.requests.append(request)
        fault = next((f for f in self.server.faults if f.times and fnmatch(request, f.request)), Fault('', times=0))
        cut = fault.times and not (fault.status or fault.corrupt)
        fault.times -= 1
        if cut and not fault.after:
            return self.cut()
        try:
            if fault.status:
                raise Refused(fault.status, f'injected {fault.status}')
            name, match = next((name, match) for pattern, name in self.routes
                               if (match := re.fullmatch(pattern, request)))
            result = getattr(self, name)(**{key: unquote(v) for key, v in match.groupdict().items() if v})
        except Refused as e:
            return self.answer(e.status, json.dumps(e.content).encode(), e.headers)
        if cut:
            return self.cut()
        data, headers = result if name == 'resolve' else (json.dumps(result).encode(), {})
        self.answer(200, data[:-1] + bytes([data[-1] ^ 1]) if fault.corrupt else data, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, data: bytes, headers: Dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def user(self) -> Tuple[str, str]:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in TOKENS:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return TOKENS.get(token, ('', ''))

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        name, role = self.user()
        repo = self.server.repos.get(repo_id)
        owned = repo_id.split('/')[0] == name
        if repo is None or (repo.private and not owned):
            raise Refused(404 if name else 401, 'Repository not found', 'RepoNotFound')
        if write and not (owned and role == 'write'):
            raise Refused(403, 'You need write access to this repository')
        return repo

    def create(self) -> Any:
        name, role = self.user()
        wanted = json.loads(self.body)
        repo_id = f'{wanted.get("organization") or name}/{wanted["name"]}'
        if role != 'write' or repo_id.split('/')[0] != name:
            raise Refused(403, f"You don't have the rights to create {repo_id}")
        url = f'{self.server.url}/{repo_id}'
        if repo_id in self.server.repos:
            raise Refused(409, 'You already created this model repo', url=url)
        self.server.add_repo(repo_id, private=wanted.get('visibility') == 'private')
        return {'url': url, 'name': repo_id, 'id': repo_id}

    def validate_yaml(self) -> Any:
        front_matter = re.match(r'---\n(.*?)\n---\n', json.loads(self.body)['content'], re.DOTALL)
        if not isinstance(yaml.safe_load(front_matter[1]).get('license', ''), str):
            raise Refused(400, 'Invalid metadata', errors=[{'message': '"license" must be a string'}])
        return {'errors': [], 'warnings': []}

    def info(self, repo: str, rev: str = 'main') -> Any:
        found = self.repo(repo)
        oid = found.refs[rev]
        return {'id': repo, 'sha': oid, 'siblings': [{'rfilename': path} for path in found.commits[oid]]}

    def branch(self, repo: str, rev: str) -> Any:
        found = self.repo(repo, write=True)
        found.refs[rev] = found.refs['main']
        return {}

    def preupload(self, repo: str, rev: str) -> Any:
        found = self.repo(repo, write=not self.create_pr)
        paths, files = [file['path'] for file in json.loads(self.body)['files']], found.commits[found.refs[rev]]
        return {'files': [{
            'path': path, 'uploadMode': 'lfs' if path.endswith('.safetensors') else 'regular', 'shouldIgnore': False,
            'oid': _file_oid(path, files[path]) if path in files else None,
        } for path in paths]}

    def lfs_batch(self, repo: str) -> Any:
        self.repo(repo)
        return {'transfer': 'basic', 'objects': [
            {**o, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{o["oid"]}'}}}
            for o in json.loads(self.body)['objects']
        ]}

    def lfs_put(self, oid: str) -> Any:
        self.server.uploads[oid] = self.body
        return {}

    def commit(self, repo: str, rev: str) -> Any:
        found = self.repo(repo, write=not self.create_pr)
        files = dict(found.commits[found.refs[rev]])
        for line in self.body.decode().splitlines():
            kind, value = json.loads(line).values()
            if kind == 'header' and value.get('parentCommit', found.refs[rev]) != found.refs[rev]:
                raise Refused(412, 'A commit has happened since. Please refresh and try again.')
            if kind == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif kind == 'lfsFile':
                files[value['path']] = self.server.uploads[value['oid']]
            elif kind == 'deletedFile':
                del files[value['path']]
        number = sum(ref.startswith('refs/pr/') for ref in found.refs) + 1
        oid = found.commit(f'refs/pr/{number}' if self.create_pr else rev, files)
        url = f'{self.server.url}/{repo}'
        pull_request = {'pullRequestUrl': f'{url}/discussions/{number}'} if self.create_pr else {}
        return {'success': True, 'commitOid': oid, 'commitUrl': f'{url}/commit/{oid}', **pull_request}

    def resolve(self, repo: str, rev: str, path: str) -> Tuple[bytes, Dict[str, str]]:
        found = self.repo(repo)
        oid = found.refs.get(rev, rev)
        if path not in found.commits[oid]:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        data = found.commits[oid][path]
        return data, {'X-Repo-Commit': oid, 'ETag': f'"{_file_oid(path, data)}"'}
