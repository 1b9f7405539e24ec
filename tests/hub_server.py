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
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_writer'  # without it, one may read
REPO, REV = r'(?P<repo>[^/]+/[^/]+)', r'(?P<rev>[^/]+)'


@dataclass
class Repo:
    """A repository. A commit is its files by path."""
    refs: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    private: bool = False

    def commit(self, ref, files):
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


class HubServer(ThreadingHTTPServer):
    """The server. Tests look at its state, and change it."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.repos, self.uploads, self.faults, self.requests = {}, {}, [], []

    def add_repo(self, repo_id, files=()):
        """Make a repository with one commit."""
        repo = self.repos[repo_id] = Repo()
        repo.commit('main', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n', **dict(files)})
        return repo

    def files(self, repo_id, ref='main'):
        repo = self.repos[repo_id]
        return repo.commits[repo.refs[ref]]

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # of connections that are cut
            super().handle_error(request, client_address)


def file_oid(path, data):
    if path.endswith('.safetensors'):  # in git-LFS
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    routes = {
        r'POST /api/repos/create': 'create',
        r'POST /api/validate-yaml': 'validate_yaml',
        rf'GET /api/models/{REPO}(/revision/{REV})?': 'info',
        rf'POST /api/models/{REPO}/branch/{REV}': 'branch',
        rf'POST /api/models/{REPO}/preupload/{REV}': 'preupload',
        rf'POST /api/models/{REPO}/commit/{REV}': 'commit',
        rf'POST /{REPO}\.git/info/lfs/objects/batch': 'lfs_batch',
        r'PUT /lfs/(?P<oid>[0-9a-f]{64})': 'lfs_put',
        rf'(HEAD|GET) /{REPO}/resolve/{REV}/(?P<path>.+)': 'resolve',
    }

    def log_message(self, *args):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        self.create_pr = 'create_pr' in url.query
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        request = f'{self.command} {url.path}'
        self.server.requests.append(request)
        fault = next((f for f in self.server.faults if f.times and fnmatch(request, f.request)), Fault('', 200))
        fault.times -= 1
        cut = not fault.status and not fault.corrupt
        if cut and not fault.after:
            return self.cut()
        try:
            if fault.status not in (0, 200):
                raise Refused(fault.status, 'injected')
            method, match = next(
                (method, match) for route, method in self.routes.items() if (match := re.fullmatch(route, request)))
            if self.command == 'POST' and self.headers.get('Authorization') != f'Bearer {TOKEN}':
                raise Refused(401, 'Invalid credentials in Authorization header')
            result = getattr(self, method)(**{key: unquote(v) for key, v in match.groupdict().items() if v})
        except Refused as e:
            status, message, *code = e.args
            headers = {'X-Error-Message': message, **({'X-Error-Code': code[0]} if code else {})}
            return self.answer(status, json.dumps(dict(error=message)).encode(), headers)
        if cut:
            return self.cut()
        data, headers = result if method == 'resolve' else (json.dumps(result).encode(), {})
        self.answer(200, data[:-1] + bytes([data[-1] ^ 1]) if fault.corrupt else data, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def cut(self):
        self.close_connection = True
        self.connection.close()

    def answer(self, status, data, headers):
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def repo(self, repo_id):
        if repo_id not in self.server.repos:
            raise Refused(404, 'Repository not found', 'RepoNotFound')
        return self.server.repos[repo_id]

    def create(self):
        wanted = json.loads(self.body)
        repo_id = f'alice/{wanted["name"]}'
        if repo_id not in self.server.repos:
            self.server.add_repo(repo_id).private = wanted.get('visibility') == 'private'
        return {'url': f'{self.server.url}/{repo_id}', 'name': repo_id, 'id': repo_id}

    def validate_yaml(self):
        return {'errors': [], 'warnings': []}

    def info(self, repo, rev='main'):
        found = self.repo(repo)
        oid = found.refs[rev]
        return {'id': repo, 'sha': oid, 'siblings': [{'rfilename': path} for path in found.commits[oid]]}

    def branch(self, repo, rev):
        self.repo(repo).refs[rev] = self.repo(repo).refs['main']
        return {}

    def preupload(self, repo, rev):
        files = self.server.files(repo, rev)
        return {'files': [{
            'path': path, 'uploadMode': 'lfs' if path.endswith('.safetensors') else 'regular', 'shouldIgnore': False,
            'oid': file_oid(path, files[path]) if path in files else None,
        } for path in (file['path'] for file in json.loads(self.body)['files'])]}

    def lfs_batch(self, repo):
        return {'transfer': 'basic', 'objects': [
            {**o, 'actions': {'upload': {'href': f'{self.server.url}/lfs/{o["oid"]}'}}}
            for o in json.loads(self.body)['objects']
        ]}

    def lfs_put(self, oid):
        self.server.uploads[oid] = self.body
        return {}

    def commit(self, repo, rev):
        found, files = self.repo(repo), dict(self.server.files(repo, rev))
        for line in self.body.decode().splitlines():
            kind, value = json.loads(line).values()
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

    def resolve(self, repo, rev, path):
        found = self.repo(repo)
        oid = found.refs.get(rev, rev)
        if path not in found.commits[oid]:
            raise Refused(404, 'Entry not found', 'EntryNotFound')
        data = found.commits[oid][path]
        return data, {'X-Repo-Commit': oid, 'ETag': f'"{file_oid(path, data)}"'}
