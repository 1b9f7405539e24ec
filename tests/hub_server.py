"""A Hugging Face Hub on loopback, in memory, for huggingface_hub's own client (written with 2.4).

Endpoints, for repositories of models:

    GET       /api/whoami-v2
    POST      /api/repos/create                             409 if it exists, 403 in a namespace of others
    POST      /api/validate-yaml                            front matter of a README.md
    GET       /api/models/REPO[/revision/REV]
    GET       /api/models/REPO/tree/REV                     recursive, on one page
    POST      /api/models/REPO/branch/NAME
    POST      /api/models/REPO/preupload/REV                .gitattributes says what is LFS
    POST      /REPO.git/info/lfs/objects/batch              basic transfer
    PUT       /lfs/SHA256                                   refused if the content has another hash
    POST      /api/models/REPO/commit/REV[?create_pr=1]     all or nothing; 412 if parentCommit is not the head
    HEAD, GET /REPO/resolve/REV/PATH                        ETag, X-Repo-Commit, X-Linked-Size, Range

REV is a branch, a commit or `refs/pr/N`. Not covered: the Xet protocol (HF_HUB_DISABLE_XET=1 makes the client use LFS),
multipart LFS uploads, tags, deletion, gated repositories, redirects to a CDN.

A `Fault` makes a request fail: with a status, or by cutting the connection before or after it has had its effect.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {'hf_writer': ('alice', 'write'), 'hf_reader': ('alice', 'read'), 'hf_other': ('bob', 'write')}
ATTRIBUTES = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n'


@dataclass
class Commit:
    """A state of a repository. Files are named by the SHA-256 of what is in them."""
    oid: str
    message: str
    files: Dict[str, str]


@dataclass
class Repo:
    """A repository: branches, pull requests and commits."""
    private: bool = False
    refs: Dict[str, str] = field(default_factory=dict)
    commits: Dict[str, Commit] = field(default_factory=dict)

    def commit(self, ref: str, message: str, files: Dict[str, str], parent: Optional[str]) -> Commit:
        oid = hashlib.sha1(f'{parent} {message} {files} {len(self.commits)}'.encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, files)
        self.refs[ref] = oid
        return self.commits[oid]


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match."""
    request: str  # a pattern such as 'POST */commit/*'
    status: int = 0  # to answer with; 0 cuts the connection
    times: int = 1
    headers: Dict[str, str] = field(default_factory=dict)
    after: bool = False  # the request has its effect before the connection is cut
    cut_at: Optional[int] = None  # bytes of the answer that are sent before the connection is cut
    corrupt: bool = False  # the answer's last byte is another


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = '', **content: Any) -> None:
        self.status, self.code = status, code
        self.content = dict(error=message, **content)


class HubServer(ThreadingHTTPServer):
    """The server. Its state may be looked at and changed while it runs."""
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.lock = threading.RLock()
        self.repos: Dict[str, Repo] = {}
        self.content: Dict[str, bytes] = {}  # by SHA-256
        self.faults: List[Fault] = []
        self.requests: List[str] = []

    def store(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.content[digest] = data
        return digest

    def add_repo(self, repo_id: str, files: Optional[Dict[str, bytes]] = None, private: bool = False) -> Repo:
        """Make a repository with one commit."""
        repo = self.repos[repo_id] = Repo(private)
        stored = {path: self.store(data) for path, data in {'.gitattributes': ATTRIBUTES, **(files or {})}.items()}
        repo.commit('main', 'initial commit', stored, None)
        return repo

    def files(self, repo_id: str, ref: str = 'main') -> Dict[str, bytes]:
        """What is in a repository."""
        repo = self.repos[repo_id]
        return {path: self.content[digest] for path, digest in repo.commits[repo.refs[ref]].files.items()}

    def is_lfs(self, commit: Commit, path: str) -> bool:
        lines = self.content[commit.files['.gitattributes']].decode().splitlines()
        return any(fnmatch(path, line.split()[0]) for line in lines if 'filter=lfs' in line)

    def handle_error(self, request, client_address) -> None:
        pass  # clients that go away, which is what some tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: HubServer
    routes: List[Tuple[str, str]] = [
        (r'GET /api/whoami-v2', 'whoami'),
        (r'POST /api/repos/create', 'create'),
        (r'POST /api/validate-yaml', 'validate_yaml'),
        (r'GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?', 'info'),
        (r'GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)', 'tree'),
        (r'POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)', 'branch'),
        (r'POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)', 'preupload'),
        (r'POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)', 'commit'),
        (r'POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
        (r'PUT /lfs/(?P<oid>[0-9a-f]{64})', 'lfs_put'),
        (r'(HEAD|GET) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'resolve'),
    ]

    def log_message(self, *args) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        request = f'{self.command} {url.path}'
        with self.server.lock:
            self.server.requests.append(request)
            fault = next((f for f in self.server.faults if f.times and fnmatch(request, f.request)), None)
            if fault:
                fault.times -= 1
                if fault.status:
                    content = {'error': f'injected {fault.status}', 'url': f'{self.server.url}/alice/model'}
                    return self.answer(fault.status, content, fault.headers)
                if not (fault.after or fault.corrupt or fault.cut_at is not None):
                    return self.cut()
            try:
                for pattern, name in self.routes:
                    if match := re.fullmatch(pattern, request):
                        result = getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items() if v})
                        break
                else:
                    raise Refused(404, f'no endpoint {request}')
            except Refused as e:
                headers = {'X-Error-Code': e.code} if e.code else {}
                return self.answer(e.status, e.content, {**headers, 'X-Error-Message': e.content['error']})
        if fault and fault.after:
            return self.cut()
        if name == 'resolve':
            return self.send_file(*result, fault)
        self.answer(200, result)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, content: Any, headers: Optional[Dict[str, str]] = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {'Content-Type': 'application/json', **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def send_file(self, data: bytes, headers: Dict[str, str], fault: Optional[Fault]) -> None:
        if fault and fault.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        total, status = len(data), 200
        if requested := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', '')):
            start, status = int(requested[1]), 206
            data = data[start:]
            headers = {**headers, 'Content-Range': f'bytes {start}-{total - 1}/{total}'}
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(len(data)), 'Accept-Ranges': 'bytes'}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault and fault.cut_at is not None:
            self.wfile.write(data[:fault.cut_at])
            self.wfile.flush()
            return self.cut()
        self.wfile.write(data)

    # who may do what

    def user(self, needed: bool = True) -> Tuple[str, str]:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in TOKENS:
            raise Refused(401, 'Invalid credentials in Authorization header')
        if needed and not token:
            raise Refused(401, 'Invalid username or password.')
        return TOKENS.get(token, ('', ''))

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        name, role = self.user(needed=write)
        repo = self.server.repos.get(repo_id)
        owned = repo_id.split('/')[0] == name
        if repo is None or (repo.private and not owned):
            raise Refused(404 if name else 401, 'Repository not found', 'RepoNotFound')
        if write and not (owned and role == 'write'):
            raise Refused(403, 'You need write access to this repository')
        return repo

    def head(self, repo: Repo, rev: str) -> Commit:
        oid = repo.refs.get(rev, rev)
        if oid not in repo.commits:
            raise Refused(404, f'Invalid rev id: {rev}', 'RevisionNotFound')
        return repo.commits[oid]

    # endpoints

    def whoami(self) -> Any:
        name, role = self.user()
        return {'type': 'user', 'name': name, 'orgs': [], 'auth': {'accessToken': {'role': role}}}

    def create(self) -> Any:
        name, role = self.user()
        wanted = json.loads(self.body)
        namespace = wanted.get('organization') or name
        repo_id = f'{namespace}/{wanted["name"]}'
        if namespace != name or role != 'write':
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = f'{self.server.url}/{repo_id}'
        if repo_id in self.server.repos:
            raise Refused(409, 'You already created this model repo', url=url)
        self.server.add_repo(repo_id, private=wanted.get('visibility') == 'private')
        return {'url': url, 'name': repo_id, 'id': repo_id}

    def validate_yaml(self) -> Any:
        front_matter = re.match(r'---\n(.*?)\n---\n', json.loads(self.body)['content'], re.DOTALL)
        content = yaml.safe_load(front_matter[1]) if front_matter else None
        if content is None:
            return {'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata in repo card'}]}
        errors = [
            {'message': f'"{key}" must be {kind.__name__}'}
            for key, kind in {'license': str, 'library_name': str, 'tags': list, 'datasets': list}.items()
            if key in content and not isinstance(content[key], kind)
        ]
        if errors:
            raise Refused(400, 'Invalid metadata', errors=errors)
        return {'errors': [], 'warnings': []}

    def info(self, repo: str, rev: str = 'main') -> Any:
        found = self.repo(repo)
        commit = self.head(found, rev)
        return {
            'id': repo, 'modelId': repo, 'sha': commit.oid, 'private': found.private, 'tags': [],
            'siblings': [{'rfilename': path} for path in commit.files],
        }

    def tree(self, repo: str, rev: str) -> Any:
        commit = self.head(self.repo(repo), rev)
        return [
            {'type': 'file', 'path': path, 'oid': self.git_oid(digest), 'size': len(self.server.content[digest])}
            for path, digest in commit.files.items()
        ]

    def branch(self, repo: str, rev: str) -> Any:
        found = self.repo(repo, write=True)
        if rev in found.refs:
            raise Refused(409, 'Reference already exists')
        found.refs[rev] = found.refs['main']
        return {}

    def git_oid(self, digest: str) -> str:
        data = self.server.content[digest]
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    def preupload(self, repo: str, rev: str) -> Any:
        create_pr = 'create_pr' in self.query
        commit = self.head(self.repo(repo, write=not create_pr), rev)
        files = []
        for file in json.loads(self.body)['files']:
            digest = commit.files.get(file['path'])
            lfs = self.server.is_lfs(commit, file['path'])
            oid = digest if lfs or not digest else self.git_oid(digest)
            files.append({
                'path': file['path'], 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False, 'oid': oid})
        return {'files': files}

    def lfs_batch(self, repo: str) -> Any:
        self.repo(repo)
        self.user()
        return {
            'transfer': 'basic',
            'objects': [
                o if o['oid'] in self.server.content else
                {**o, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{o["oid"]}'}}}
                for o in json.loads(self.body)['objects']
            ],
        }

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, 'the content does not have the SHA-256 that was announced')
        self.server.store(self.body)
        return {}

    def commit(self, repo: str, rev: str) -> Any:
        create_pr = 'create_pr' in self.query
        found = self.repo(repo, write=not create_pr)
        self.user()
        head = self.head(found, rev)
        files, message = dict(head.files), ''
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'header':
                message = value['summary']
                if value.get('parentCommit', head.oid) != head.oid:
                    raise Refused(412, 'A commit has happened since. Please refresh and try again.')
            elif item['key'] == 'file':
                files[value['path']] = self.server.store(base64.b64decode(value['content']))
            elif item['key'] == 'lfsFile':
                if value['oid'] not in self.server.content:
                    raise Refused(400, f'LFS pointer pointed to a file that does not exist: {value["path"]}')
                files[value['path']] = value['oid']
            elif item['key'] == 'deletedFile':
                if value['path'] not in files:
                    raise Refused(404, "A file with this name doesn't exist", 'EntryNotFound')
                del files[value['path']]
        number = sum(ref.startswith('refs/pr/') for ref in found.refs) + 1
        commit = found.commit(f'refs/pr/{number}' if create_pr else rev, message, files, head.oid)
        url = f'{self.server.url}/{repo}'
        result = {'success': True, 'commitOid': commit.oid, 'commitUrl': f'{url}/commit/{commit.oid}'}
        if create_pr:
            result['pullRequestUrl'] = f'{url}/discussions/{number}'
        return result

    def resolve(self, repo: str, rev: str, path: str) -> Any:
        commit = self.head(self.repo(repo), rev)
        if path not in commit.files:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        digest = commit.files[path]
        data, headers = self.server.content[digest], {'X-Repo-Commit': commit.oid}
        if self.server.is_lfs(commit, path):
            headers.update({'X-Linked-Etag': f'"{digest}"', 'X-Linked-Size': str(len(data)), 'ETag': f'"{digest}"'})
        else:
            headers['ETag'] = f'"{self.git_oid(digest)}"'
        return data, headers
