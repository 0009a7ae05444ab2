//! Tunnels: TLS from outside, plain bytes to a port of a sandbox.

use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::proto::client::{PortSpec, TunnelData};
use super::sandbox::Sandbox;
use super::wire::Network;

/// Carries connections to a Unix socket on to a port of the network that it runs in.
const FORWARD: &str = r#"
import os, socket, sys, threading
def end():
    os.read(0, 1)
    os._exit(0)
threading.Thread(target=end, daemon=True).start()
def carry(a, b):
    try:
        while data := a.recv(1 << 16):
            b.sendall(data)
        b.shutdown(socket.SHUT_WR)
    except OSError:
        a.close(), b.close()
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(64)
while True:
    near = listener.accept()[0]
    try:
        far = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    except OSError:
        near.close()
        continue
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for pair in (near, far), (far, near):
        threading.Thread(target=carry, args=pair, daemon=True).start()
"#;

/// Who vouches for the tunnels.
pub(crate) struct Authority {
    pub(crate) certificate: PathBuf,
    acceptor: TlsAcceptor,
}

impl Authority {
    /// A new one, whose certificate is in `folder`.
    pub(crate) fn new(folder: &Path) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "The stand-in of Modal");
        let key = KeyPair::generate().unwrap();
        let certificate = folder.join("tunnels.pem");
        std::fs::write(&certificate, params.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(params, key);

        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "A tunnel");
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &issuer).unwrap();
        let chain = vec![CertificateDer::from(leaf.der().to_vec())];
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Self { certificate, acceptor: TlsAcceptor::from(Arc::new(config)) }
    }

    /// Opens the tunnels of a sandbox, which end with it.
    pub(crate) fn open(&self, network: &Arc<Network>, sandbox: &Arc<Sandbox>) -> io::Result<()> {
        for spec in sandbox.ports() {
            let way = Arc::new(Way::to(sandbox, &spec)?);
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let (address, connections) = network.listen(listener)?;
            let (host, port) = ("127.0.0.1".to_owned(), u32::from(address.port()));
            let tunnel = TunnelData { container_port: spec.port, ..TunnelData::default() };
            sandbox.tunnels.lock().unwrap().push(match spec.unencrypted {
                false => TunnelData { host, port, ..tunnel },
                true => TunnelData {
                    unencrypted_host: Some(host),
                    unencrypted_port: Some(port),
                    ..tunnel
                },
            });
            let acceptor = (!spec.unencrypted).then(|| self.acceptor.clone());
            let mut ended = sandbox.watch();
            let all = serve(connections, acceptor, way);
            tokio::spawn(async move {
                tokio::select! {
                    () = all => {}
                    _ = ended.wait_for(Option::is_some) => {}
                }
            });
        }
        Ok(())
    }
}

/// How a tunnel gets to the sandbox's port.
enum Way {
    /// The sandbox shares this machine's network.
    Port(u16),
    /// Through a process in the sandbox's network, which ends with this.
    Socket(PathBuf, #[allow(dead_code, reason = "killed when it's dropped")] Box<Child>),
}

impl Way {
    fn to(sandbox: &Sandbox, spec: &PortSpec) -> io::Result<Self> {
        let port = u16::try_from(spec.port).map_err(io::Error::other)?;
        let Some(anchor) = sandbox.anchor() else { return Ok(Self::Port(port)) };
        let path = sandbox.private.join(format!("{port}.socket"));
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{anchor}/ns/net"));
        command.args(["--", "python3", "-c", FORWARD]).arg(&path).arg(port.to_string());
        // The end of its stdin ends it, too, when this process goes without a word.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.kill_on_drop(true).spawn()?;
        Ok(Self::Socket(path, Box::new(child)))
    }

    async fn connect(&self) -> io::Result<Box<dyn Both>> {
        match self {
            Self::Port(port) => {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Self::Socket(path, _) => Ok(Box::new(UnixStream::connect(path).await?)),
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Both for T {}

async fn serve(
    mut connections: mpsc::Receiver<tokio::io::DuplexStream>,
    acceptor: Option<TlsAcceptor>,
    way: Arc<Way>,
) {
    // Connections end with the tunnel.
    let mut all = tokio::task::JoinSet::new();
    while let Some(connection) = connections.recv().await {
        let (acceptor, way) = (acceptor.clone(), way.clone());
        all.spawn(async move {
            let mut near: Box<dyn Both> = match acceptor {
                Some(acceptor) => match acceptor.accept(connection).await {
                    Ok(stream) => Box::new(stream),
                    Err(_) => return,
                },
                None => Box::new(connection),
            };
            if let Ok(mut far) = way.connect().await {
                let _ = copy_bidirectional(&mut near, &mut far).await;
            }
        });
        while all.try_join_next().is_some() {}
    }
}
