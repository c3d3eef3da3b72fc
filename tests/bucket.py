"""A bucket that needs no internet: what gcsfs, Google's own client and TensorStore ask of one.

Objects are written whole or not at all and there are no folders, as in the real store; nothing
else of it is imitated.
"""

import base64
import email
import http.server
import json
import re
import threading
import urllib.parse
import zlib
from typing import Any

_OBJECT = re.compile(r'^(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)$')
_LIST = re.compile(r'^(?:/upload|/resumable/upload)?/storage/v1/b/([^/]+)/o/?$')
_BUCKET = re.compile(r'^/storage/v1/b/([^/]+)$')
Answer = tuple[int, dict[str, str], bytes]


class Bucket:
  """A server of one process, whose objects lie in a dict.

  Attributes:
    objects: content and number of the generation by `bucket/name`.
    written: names in the order in which they were written.
    url: of the server.
    hold: part of a name whose writing never ends, or ''.
    held: set when such a write has come.
    refused: code of the answer to everything, or 0.
  """

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.written: list[str] = []
    self.hold, self.held, self.refused = '', threading.Event(), 0
    self._uploads: dict[str, tuple[str, bytes]] = {}
    self._lock = threading.Lock()
    self._count = 0
    bucket = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
          body = _chunks(self.rfile)
        if bucket.hold and bucket.hold.encode() in self.path.encode() + body[:2000]:
          bucket.held.set()
          self.close_connection = True
          return threading.Event().wait(60) and None
        with bucket._lock:
          code, headers, content = bucket.answer(self.command, self.path, self.headers, body)
        self.send_response(code)
        for key, value in {**headers, 'Content-Length': str(len(content))}.items():
          self.send_header(key, value)
        self._headers_buffer.append(b'\r\n' + content)  # one packet
        self.flush_headers()

      do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

      def log_message(self, format: str, *args: Any) -> None:
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self._server.daemon_threads = True
    self._server.handle_error = lambda *_: None  # a client that was killed
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

  @property
  def environment(self) -> dict[str, str]:
    """Variables that send the three libraries here."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'TENSORSTORE_GCS_HTTP_VERSION': '1.1',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
      'GOOGLE_CLOUD_PROJECT': 'project',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # asks by gRPC for the kind of bucket
    }

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def names(self, prefix: str = '') -> list[str]:
    """Returns the names of all objects whose name begins so, in order."""
    with self._lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def remove(self, prefix: str) -> None:
    for name in self.names(prefix):
      del self.objects[name]

  def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
    url = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    if self.refused:
      return _json({'error': {'code': self.refused, 'message': 'refused'}}, self.refused)
    if url.path.startswith('/batch'):
      return self._batch(headers, body)
    if 'upload_id' in query:
      return self._continue(query['upload_id'], headers, body)
    if found := _OBJECT.match(url.path):
      key = f'{found[1]}/{urllib.parse.unquote(found[2])}'
      return self._object(method, key, query, headers)
    if found := _LIST.match(url.path):
      if method == 'POST':
        return self._insert(found[1], query, headers, body)
      return self._list(found[1], query)
    if found := _BUCKET.match(url.path):
      return _json({'kind': 'storage#bucket', 'name': found[1], 'location': 'US'})
    return _json({'error': {'code': 501, 'message': f'{method} {target}'}}, 501)

  def _object(self, method: str, key: str, query: dict[str, str], headers: Any) -> Answer:
    if key not in self.objects:
      return _missing(key)
    content, generation = self.objects[key]
    if query.get('ifGenerationMatch') not in (None, str(generation)):
      return _json({'error': {'code': 412, 'message': key}}, 412)
    if query.get('ifGenerationNotMatch') == str(generation):
      return 304, {}, b''
    if method == 'DELETE':
      del self.objects[key]
      return 204, {}, b''
    if query.get('alt') != 'media':
      return _json(_resource(key, content, generation))
    more = {'Content-Type': 'application/octet-stream', 'X-Goog-Generation': str(generation)}
    found = re.match(r'bytes=(\d*)-(\d*)$', headers.get('Range') or '')
    if not found:
      return 200, more, content
    size = len(content)
    first = int(found[1]) if found[1] else max(size - int(found[2]), 0)
    last = min(int(found[2]), size - 1) if found[1] and found[2] else size - 1
    if first >= size:
      return 416, more | {'Content-Range': f'bytes */{size}'}, b''
    more['Content-Range'] = f'bytes {first}-{last}/{size}'
    return 206, more, content[first : last + 1]

  def _write(self, key: str, content: bytes, query: dict[str, str]) -> Answer:
    current = self.objects.get(key, (b'', 0))[1]
    if query.get('ifGenerationMatch') not in (None, str(current)):
      return _json({'error': {'code': 412, 'message': key}}, 412)
    self._count += 1
    self.objects[key] = content, self._count
    self.written.append(key)
    return _json(_resource(key, content, self._count))

  def _insert(self, bucket: str, query: dict[str, str], headers: Any, body: bytes) -> Answer:
    kind = query.get('uploadType')
    if kind == 'media':
      return self._write(f'{bucket}/{query["name"]}', body, query)
    if kind == 'multipart':
      parts = _parts(headers, body)
      name = query.get('name') or json.loads(parts[0])['name']
      return self._write(f'{bucket}/{name}', parts[1], query)
    name = query.get('name') or json.loads(body)['name']
    self._count += 1
    self._uploads[str(self._count)] = f'{bucket}/{name}', b''
    where = f'{self.url}/upload/storage/v1/b/{bucket}/o?upload_id={self._count}'
    return 200, {'Location': where, 'X-GUploader-UploadID': str(self._count)}, b''

  def _continue(self, upload: str, headers: Any, body: bytes) -> Answer:
    key, content = self._uploads[upload]
    content += body
    self._uploads[upload] = key, content
    if (headers.get('Content-Range') or '').endswith('/*'):
      return 308, {'Range': f'bytes=0-{len(content) - 1}'} if content else {}, b''
    return self._write(key, content, {})

  def _list(self, bucket: str, query: dict[str, str]) -> Answer:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, folders = [], {}
    for key in sorted(self.objects):
      name = key.removeprefix(f'{bucket}/')
      if not key.startswith(f'{bucket}/') or not name.startswith(prefix):
        continue
      if name < query.get('startOffset', '') or (
        'endOffset' in query and name >= query['endOffset']
      ):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
      else:
        items.append(_resource(key, *self.objects[key]))
    answer: dict[str, Any] = {'kind': 'storage#objects'}
    most = int(query.get('maxResults') or 1000)
    if items:
      answer['items'] = items[:most]
    if folders:
      answer['prefixes'] = list(folders)[:most]
    return _json(answer)

  def _batch(self, headers: Any, body: bytes) -> Answer:
    answers = []
    for part in _parts(headers, body):
      method, target, _ = part.decode().splitlines()[0].split(' ')
      code, _, content = self.answer(
        method, urllib.parse.urlsplit(target)._replace(scheme='', netloc='').geturl(), {}, b''
      )
      text = f'HTTP/1.1 {code} X\r\nContent-Type: application/json\r\n\r\n{content.decode()}'
      answers.append(f'--cut\r\nContent-Type: application/http\r\n\r\n{text}\r\n')
    content = (''.join(answers) + '--cut--\r\n').encode()
    return 200, {'Content-Type': 'multipart/mixed; boundary=cut'}, content


def _chunks(file: Any) -> bytes:
  body = b''
  while size := int(file.readline(), 16):
    body += file.read(size)
    file.readline()
  file.readline()
  return body


def _parts(headers: Any, body: bytes) -> list[bytes]:
  """The contents of a multipart body, bit for bit."""
  head = f'Content-Type: {headers["Content-Type"]}\r\n\r\n'.encode()
  boundary = email.message_from_bytes(head).get_boundary()
  assert boundary
  parts = re.split(rb'\r?\n?--' + re.escape(boundary.encode()) + rb'(?:--)?\r?\n?', body)
  return [re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1] for part in parts if part.strip()]


def _resource(key: str, content: bytes, generation: int) -> dict[str, Any]:
  bucket, _, name = key.partition('/')
  return {
    'kind': 'storage#object',
    'name': name,
    'bucket': bucket,
    'generation': str(generation),
    'metageneration': '1',
    'size': str(len(content)),
    'contentType': 'application/octet-stream',
    'storageClass': 'STANDARD',
    'timeCreated': '2024-01-01T00:00:00.000Z',
    'updated': '2024-01-01T00:00:00.000Z',
    'etag': str(generation),
    'mediaLink': '',
    'crc32c': base64.b64encode(zlib.crc32(content).to_bytes(4, 'big')).decode(),
  }


def _missing(key: str) -> Answer:
  return _json({'error': {'code': 404, 'message': f'No such object: {key}'}}, 404)


def _json(value: Any, code: int = 200) -> Answer:
  return code, {'Content-Type': 'application/json; charset=UTF-8'}, json.dumps(value).encode()
