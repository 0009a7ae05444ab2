//! Network, processes, signals: the guest has no such calls, whatever Python has names for.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use kaa::Outcome;
use serde_json::Value as Json;

use super::common::{print, run, session};

/// Each line is an expression that would reach a port or a name, were there a way.
const REACHES: &str = r#"
socket.socket()
socket.socket(socket.AF_INET, socket.SOCK_STREAM)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
socket.socket(1, socket.SOCK_STREAM)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', DATAGRAMS))
socket.socketpair()
socket.create_connection(('127.0.0.1', PORT), 1)
socket.create_connection(('localhost', PORT), 1)
socket.create_server(('127.0.0.1', 0))
socket.fromfd(3, socket.AF_INET, socket.SOCK_STREAM).connect(('127.0.0.1', PORT))
_socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
urllib.request.urlopen(f'http://127.0.0.1:{PORT}/', timeout=1)
urllib.request.urlopen(f'https://127.0.0.1:{PORT}/', timeout=1)
urllib.request.urlopen(f'ftp://127.0.0.1:{PORT}/', timeout=1)
urllib.request.urlopen('file:///etc/passwd')
urllib.request.urlopen('file://localhost/etc/passwd')
http.client.HTTPConnection('127.0.0.1', PORT, timeout=1).request('GET', '/')
ftplib.FTP().connect('127.0.0.1', PORT, 1)
smtplib.SMTP('127.0.0.1', PORT, timeout=1)
poplib.POP3('127.0.0.1', PORT, timeout=1)
imaplib.IMAP4('127.0.0.1', PORT, timeout=1)
xmlrpc.client.ServerProxy(f'http://127.0.0.1:{PORT}').ping()
socketserver.TCPServer(('127.0.0.1', 0), None)
http.server.HTTPServer(('127.0.0.1', 0), None)
logging.handlers.SocketHandler('127.0.0.1', PORT).createSocket() or fail()
logging.handlers.SysLogHandler(('127.0.0.1', DATAGRAMS)).emit(logging.makeLogRecord({'msg': 'x'})) or fail()
logging.handlers.DatagramHandler('127.0.0.1', DATAGRAMS).send(b'x') or fail()
asyncio.run(asyncio.open_connection('127.0.0.1', PORT))
asyncio.run(asyncio.start_server(print, '127.0.0.1', 0))
asyncio.run(asyncio.open_unix_connection('/tmp/x'))
asyncio.run(asyncio.create_subprocess_exec('true'))
multiprocessing.connection.Client(('127.0.0.1', PORT))
multiprocessing.connection.Listener(('127.0.0.1', 0))
multiprocessing.Process(target=print).start()
subprocess.run(['true'])
subprocess.Popen('true', shell=True)
os.system('true')
os.popen('true')
os.fork()
os.forkpty()
os.execv('/bin/true', ['true'])
os.posix_spawn('/bin/true', ['true'], {})
os.spawnv(0, '/bin/true', ['true'])
os.kill(1, 0)
os.kill(-1, 9)
os.killpg(0, 9)
os.pipe()
os.pipe2(0)
os.mkfifo('/tmp/fifo')
os.mknod('/tmp/node')
os.chroot('/tmp')
os.setuid(0)
os.chown('/tmp', 0, 0)
os.sendfile(1, 3, 0, 10)
os.memfd_create('x')
os.ptrace(0)
os.openpty()
os.getppid()
os.setsid()
os.setpriority(0, 0, -20)
os.nice(-1)
os.sched_setaffinity(0, {0})
mmap.mmap(3, 100)
signal.pthread_kill(1, 9)
ctypes.CDLL(None)
_posixsubprocess.fork_exec()
_posixshmem.shm_open('/x', 0, 0)
ssl.create_default_context()
fcntl.flock(3, 0)
pty.spawn('sh')
webbrowser.open(f'http://127.0.0.1:{PORT}/') or fail()
"#;

#[tokio::test]
async fn nothing_reaches_a_port_or_a_process() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    datagrams.set_nonblocking(true).unwrap();
    let datagrams_port = datagrams.local_addr().unwrap().port();
    let mut session = session();
    let code = format!(
        r#"
import importlib, json, warnings
warnings.simplefilter('ignore')
PORT, DATAGRAMS, reached, how = {port}, {datagrams_port}, [], {{}}
def fail(): raise OSError('it said so itself')
def fill(source):
    # The modules that the expression names, as far as there are any.
    parts = source.replace('(', '.').split('.')
    for depth in (1, 2, 3):
        try: importlib.import_module('.'.join(parts[:depth]))
        except ImportError: pass
    try: globals()[parts[0]] = importlib.import_module(parts[0])
    except ImportError: pass
    import asyncio, socket
    globals().update(asyncio=asyncio, socket=socket)
for source in {REACHES:?}.strip().splitlines():
    fill(source)
    try:
        reached.append(source + ' gave ' + repr(eval(source)))
    except Exception as error:
        how[source] = type(error).__name__
print(json.dumps([reached, how]))"#
    );
    let found: Json = serde_json::from_str(&print(&mut session, &code).await).unwrap();
    assert_eq!(found[0], Json::Array(vec![]), "{found:#}");
    let how = found[1].as_object().unwrap();
    assert_eq!(how.len(), REACHES.trim().lines().count(), "{found:#}");
    assert_eq!(how["socket.socket()"], "OSError");
    assert_eq!(how["os.fork()"], "AttributeError");
    let nobody = listener.accept().unwrap_err().kind();
    let nothing = datagrams.recv(&mut [0; 8]).unwrap_err().kind();
    assert_eq!((nobody, nothing), (ErrorKind::WouldBlock, ErrorKind::WouldBlock));
    // Whoever has a way does come through, and is seen.
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    datagrams.send_to(b"x", ("127.0.0.1", datagrams_port)).unwrap();
    listener.set_nonblocking(false).unwrap();
    datagrams.set_nonblocking(false).unwrap();
    datagrams.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    listener.accept().unwrap();
    assert_eq!(datagrams.recv(&mut [0; 8]).unwrap(), 1);
}

/// What is said of sockets on the descriptors that there are: files are none.
#[tokio::test]
async fn descriptors_are_no_sockets() {
    let mut session = session();
    let code = r"
import os, socket, _socket
os.open('/tmp/f', os.O_CREAT | os.O_RDWR)
made = []
for fd in [*range(0, 65), -1, 2**31 - 1]:
    for family in (0, 1, 2, 3, 10):
        for kind in (1, 2, 5, 6):
            try: made.append(_socket.socket(family, kind, 0, fd))
            except (OSError, ValueError, OverflowError): pass
methods = ['accept', '_accept', 'bind', 'connect', 'connect_ex', 'listen', 'recv', 'recv_into', 'recvfrom', 'recvmsg', 'send', 'sendall',
           'sendto', 'sendmsg', 'shutdown', 'getpeername', 'getsockname', 'setsockopt', 'getsockopt', 'setblocking']
arguments = [(), (1,), (b'x',), (('127.0.0.1', 9),), (b'x', ('127.0.0.1', 9)), (1, 1), (1, 1, 1)]
answers = set()
for one in made:
    for name in methods:
        for given in arguments:
            try: answers.add((name, repr(getattr(one, name)(*given))))
            except (OSError, TypeError, AttributeError, ValueError, OverflowError): pass
print(sorted(answers))";
    let execution = run(&mut session, code).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{}", execution.stderr.text());
    let text = execution.stdout.text();
    // A timeout can be set on anything; nothing is ever sent, received or named.
    assert!(text == "[]\n" || text == "[('setblocking', 'None')]\n", "{text}");
}
