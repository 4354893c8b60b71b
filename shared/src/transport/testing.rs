//! Certificates and connected streams for the tests of this crate.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::{Acceptor, DataStream, Dialer, Identity, Join, PeerAddress, Role, Secret, Versions};

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// That what `attempt` measures takes less than a second. A busy machine may have no time for it just then, and so it
/// is measured again; what waits for anything else takes as long each time.
pub(crate) fn takes_less_than_a_second(mut attempt: impl FnMut() -> Duration) {
    let mut took = Vec::new();
    while took.last().is_none_or(|last| *last >= Duration::from_secs(1)) {
        assert!(took.len() < 5, "{took:?}");
        took.push(attempt());
    }
}

/// A certificate authority in a directory of its own.
pub(crate) struct Authority {
    dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// When a test certificate is valid.
#[derive(Clone, Copy)]
pub(crate) enum Validity {
    Now,
    Past,
    Future,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a CA certificate");
        let dir = TempDir::new().expect("a directory");
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).expect("CA file written");
        Self { dir, issuer }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Writes a certificate and a key for `name`; gives both paths.
    pub(crate) fn issue(&self, name: &str, validity: Validity) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a DNS name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let (from, to) = match validity {
            Validity::Now => (2020, 2120),
            Validity::Past => (2001, 2002),
            Validity::Future => (2118, 2120),
        };
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(to, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let base = self.dir.path().join(format!("{name}-{}", Uuid::new_v4()));
        let (certificate_path, key_path) = (base.with_extension("pem"), base.with_extension("key"));
        std::fs::write(&certificate_path, certificate.pem()).expect("certificate written");
        std::fs::write(&key_path, key.serialize_pem()).expect("key written");
        (certificate_path, key_path)
    }

    pub(crate) fn identity(&self, name: &str) -> Identity {
        self.identity_trusting(name, Validity::Now, &self.ca())
    }

    pub(crate) fn identity_trusting(&self, name: &str, validity: Validity, ca: &Path) -> Identity {
        let (certificate, key) = self.issue(name, validity);
        Identity::load(ca, &certificate, &key).expect("an identity")
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// `count` connected pairs over loopback TCP: (client's end, server's end) for each index.
pub(crate) fn stream_pairs(
    role: Role,
    encrypted: bool,
    count: u32,
) -> Vec<(DataStream, DataStream)> {
    let authority = Authority::new();
    let dialer = Dialer::new(authority.identity("alpha"), Versions::OURS);
    let acceptor = Acceptor::new(authority.identity("beta"), Versions::OURS);
    runtime().block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("its address").to_string();
        let to = PeerAddress { name: "beta".into(), address };
        let secret = Secret::random().expect("randomness");
        let mut pairs = Vec::new();
        for index in 0..count {
            let client = async {
                let connection = dialer.dial(&to, role, LIMIT).await?;
                let session = Uuid::from_bytes([1; 16]);
                connection.join(&Join { session, secret: secret.clone(), index, encrypted }).await
            };
            let server = async {
                let (tcp, _) = listener.accept().await.expect("a client");
                let joining = acceptor.accept(tcp).await?.joining().await?;
                let peer = joining.peer().clone();
                joining.admit(&secret, &peer, encrypted).await
            };
            let (client, server) = tokio::join!(client, server);
            pairs.push((client.expect("client joins"), server.expect("server admits")));
        }
        pairs
    })
}
