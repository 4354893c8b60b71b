//! Peers that are not what they should be: nobody there, another's certificate, an expired or foreign one,
//! none at all, another version of the protocol. Refused, on either side, with a word that says why.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use decamp_shared::transport::{Acceptor, Identity, Versions};
use nix::sched::{CloneFlags, setns};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::oneshot;

use crate::certificates::{Papers, issue, issue_foreign};
use crate::hosts::{ALPHA, BETA, CLIENT, Hosts, hosts};
use crate::refusals::{idle, refused, untouched};
use crate::{Needs, Test};

/// Where a false peer listens on beta.
const FALSE_PORT: u16 = 7498;
/// That peer as a destination.
const FALSE_PEER: &str = "beta:7498";
/// A port that nobody listens on.
const NOBODY: &str = "beta:7499";

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("refusals::nobody_listening", Needs::Kvm, nobody),
        Test::new("refusals::agent_away", Needs::Kvm, agent_away),
        Test::new("refusals::not_a_decamp", Needs::Kvm, not_a_decamp),
        Test::new("refusals::peer_of_another_name", Needs::Kvm, another_name),
        Test::new("refusals::expired_peer", Needs::Kvm, expired_peer),
        Test::new("refusals::foreign_peer", Needs::Kvm, foreign_peer),
        Test::new("refusals::peer_of_another_version", Needs::Kvm, another_version),
        Test::new("refusals::expired_here", Needs::Kvm, expired_here),
        Test::new("refusals::foreign_here", Needs::Kvm, foreign_here),
        Test::new("refusals::no_certificate", Needs::Hosts, no_certificate),
    ]
}

fn nobody() {
    untouched(|hosts, _| {
        let words = ["migrate", "idle", "--to", NOBODY];
        refused(hosts.decamp(ALPHA, &words), &["beta", "10.77.0.2:7499", "Nobody listens"]);
    });
}

fn agent_away() {
    let hosts = hosts();
    hosts.mend();
    let guest = idle(hosts);
    hosts.hosts(&["agent", BETA, "stop"]).expect(0);
    let ran = hosts.decamp(ALPHA, &["migrate", "idle", "--to", BETA]);
    hosts.start_agent(BETA, "");
    refused(ran, &["beta", "10.77.0.2:7420"]);
    guest.runs_clean(ALPHA);
}

/// Something listens there and speaks another language.
fn not_a_decamp() {
    untouched(|hosts, _| {
        let peer = FalsePeer::listen(hosts, |listener| async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                let _ = tokio::io::AsyncWriteExt::write_all(&mut tcp, b"SSH-2.0-x\r\n").await;
            }
        });
        let ran = hosts.decamp(ALPHA, &["migrate", "idle", "--to", FALSE_PEER]);
        peer.end();
        refused(ran, &["beta", "10.77.0.2:7498"]);
    });
}

fn another_name() {
    refused_by_name(
        |hosts| papers(hosts, "other", "gamma", 365),
        Versions::OURS,
        &["beta", "certificate"],
    );
}

fn expired_peer() {
    refused_by_name(|hosts| papers(hosts, "old", "beta", -1), Versions::OURS, &["expired"]);
}

fn foreign_peer() {
    let foreign = |hosts: &Hosts| {
        issue_foreign(&authority(hosts), &hosts.path(BETA, "conf"), "foreign", "beta")
    };
    refused_by_name(foreign, Versions::OURS, &["certificate"]);
}

fn another_version() {
    let newer = Versions { min: 7, max: 9 };
    refused_by_name(
        |hosts| papers(hosts, "newer", "beta", 365),
        newer,
        &["protocol", "7 to 9", "1"],
    );
}

/// Moves to a peer with these papers and versions are refused with these words.
fn refused_by_name(papers: impl Fn(&Hosts) -> Papers, versions: Versions, says: &[&str]) {
    untouched(|hosts, _| {
        let Papers { ca, certificate, key } = papers(hosts);
        let identity = Identity::load(&ca, &certificate, &key).expect("papers");
        let peer = FalsePeer::listen(hosts, move |listener| async move {
            let acceptor = Acceptor::new(identity, versions);
            while let Ok((tcp, _)) = listener.accept().await {
                let _ = acceptor.accept(tcp).await;
            }
        });
        let ran = hosts.decamp(ALPHA, &["migrate", "idle", "--to", FALSE_PEER]);
        peer.end();
        refused(ran, says);
    });
}

/// This host's own certificate has expired: the other end says so.
fn expired_here() {
    refused_with(|hosts| papers_of_alpha(hosts, "old", -1), &["certificate"]);
}

/// This host's certificate is another authority's.
fn foreign_here() {
    let foreign = |hosts: &Hosts| {
        issue_foreign(&authority(hosts), &hosts.path(ALPHA, "conf"), "foreign", "alpha")
    };
    refused_with(foreign, &["certificate"]);
}

/// Alpha's agent has these papers, and its moves are refused with these words.
fn refused_with(papers: impl Fn(&Hosts) -> Papers, says: &[&str]) {
    let hosts = hosts();
    hosts.mend();
    let guest = idle(hosts);
    let Papers { certificate, .. } = papers(hosts);
    let stem = certificate.file_stem().expect("a name").to_string_lossy().into_owned();
    let presented = hosts.reconfigure(ALPHA, |text| {
        text.replace("/alpha.pem", &format!("/{stem}.pem"))
            .replace("/alpha.key", &format!("/{stem}.key"))
    });
    let ran = hosts.decamp(ALPHA, &["migrate", "idle", "--to", BETA]);
    drop(presented);
    refused(ran, says);
    guest.runs_clean(ALPHA);
    assert_eq!(hosts.state(BETA, "idle"), None);
}

/// A client without a certificate gets no further than the handshake, and the agent goes on serving others.
fn no_certificate() {
    let hosts = hosts();
    hosts.mend();
    let ca = authority(hosts).join("ca.pem");
    let refused = std::thread::spawn(move || {
        let namespace = File::open(format!("/run/netns/{CLIENT}")).expect("the clients' network");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("it can be entered");
        speak_without_certificate(&ca)
    });
    let error = refused.join().expect("a client").expect_err("it was served without a certificate");
    assert!(error.contains("CertificateRequired"), "{error}");
    let guest = idle(hosts);
    hosts.decamp(ALPHA, &["migrate", "idle", "--to", BETA]).expect(0);
    guest.runs_clean(BETA);
}

fn speak_without_certificate(ca: &PathBuf) -> Result<(), String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("the authority")).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"decamp".to_vec()];
    let name = ServerName::try_from("beta").expect("a name");
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut tcp = TcpStream::connect("10.77.0.2:7420").expect("the agent listens");
    tcp.set_read_timeout(Some(Duration::from_secs(120))).expect("a deadline");
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    stream.write_all(&[0; 16]).map_err(|error| error.to_string())?;
    let read = stream.read(&mut [0; 16]).map_err(|error| error.to_string())?;
    if read == 0 { Err("closed without a word".to_owned()) } else { Ok(()) }
}

fn authority(hosts: &Hosts) -> PathBuf {
    hosts.path("pki", "")
}

fn papers(hosts: &Hosts, stem: &str, name: &str, days: i64) -> Papers {
    issue(&authority(hosts), &hosts.path(BETA, "conf"), stem, name, days)
}

fn papers_of_alpha(hosts: &Hosts, stem: &str, days: i64) -> Papers {
    issue(&authority(hosts), &hosts.path(ALPHA, "conf"), stem, "alpha", days)
}

/// Somebody who listens on beta beside its agent.
struct FalsePeer {
    end: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl FalsePeer {
    fn listen<F, W>(hosts: &Hosts, serve: F) -> Self
    where
        F: FnOnce(tokio::net::TcpListener) -> W + Send + 'static,
        W: Future<Output = ()>,
    {
        let pid = std::fs::read_to_string(hosts.path(BETA, "init.ready")).expect("beta is up");
        let namespace = File::open(format!("/proc/{}/ns/net", pid.trim())).expect("its network");
        let (end, ended) = oneshot::channel();
        let (listens, listening) = channel();
        let thread = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("it can be entered");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async move {
                let address = SocketAddr::from(([10, 77, 0, 2], FALSE_PORT));
                let listener =
                    tokio::net::TcpListener::bind(address).await.expect("the port is free");
                listens.send(()).expect("somebody waits");
                tokio::select! {
                    () = serve(listener) => {}
                    _ = ended => {}
                }
            });
        });
        listening.recv().expect("the false peer listens");
        Self { end, thread }
    }

    fn end(self) {
        // It may have ended by itself.
        let _ = self.end.send(());
        self.thread.join().expect("the false peer does not panic");
    }
}
