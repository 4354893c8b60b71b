//! Connections over loopback, with certificates that are right and wrong in each way.

use std::io::{IoSlice, Write};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use super::testing::{Authority, LIMIT, Validity, stream_pairs, takes_less_than_a_second};
use super::*;
use crate::protocol::manifest::Refusal;

/// Lets `dialer` dial `acceptor` under `name`, and gives what both say.
async fn meet(
    dialer: &Dialer,
    acceptor: &Acceptor,
    name: &str,
    role: Role,
) -> (Result<Connection>, Result<Connection>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address").to_string();
    let to = PeerAddress { name: name.into(), address };
    let server = async {
        let (tcp, _) = listener.accept().await.expect("a client");
        acceptor.accept(tcp).await
    };
    tokio::join!(dialer.dial(&to, role, LIMIT), server)
}

fn dialer(identity: Identity) -> Dialer {
    Dialer::new(identity, Versions::OURS)
}

fn acceptor(identity: Identity) -> Acceptor {
    Acceptor::new(identity, Versions::OURS)
}

#[tokio::test]
async fn two_hosts_of_one_authority_meet_and_know_each_other() {
    let authority = Authority::new();
    let (client, server) = meet(
        &dialer(authority.identity("alpha")),
        &acceptor(authority.identity("beta")),
        "beta",
        Role::Control,
    )
    .await;
    let (client, server) = (client.expect("client"), server.expect("server"));
    assert_eq!((client.peer().name.as_str(), server.peer().name.as_str()), ("beta", "alpha"));
    assert_ne!(client.peer().fingerprint, server.peer().fingerprint);
    assert_eq!((client.version(), server.version()), (1, 1));
    assert_eq!((client.role(), server.role()), (Role::Control, Role::Control));
}

#[tokio::test]
async fn the_server_must_be_the_host_that_was_dialled() {
    let authority = Authority::new();
    let (client, server) = meet(
        &dialer(authority.identity("alpha")),
        &acceptor(authority.identity("beta")),
        "gamma",
        Role::Control,
    )
    .await;
    match client.expect_err("not gamma") {
        TransportError::PeerName { name, .. } => assert_eq!(name, "gamma"),
        other => panic!("{other:?}"),
    }
    assert!(server.is_err());
}

#[tokio::test]
async fn wrong_certificates_are_named_on_both_sides() {
    let ours = Authority::new();
    let foreign = Authority::new();
    let alpha = |validity| ours.identity_trusting("alpha", validity, &ours.ca());
    let beta = |validity| ours.identity_trusting("beta", validity, &ours.ca());
    let stranger = |name| foreign.identity_trusting(name, Validity::Now, &ours.ca());
    use TransportError as E;
    type Is = fn(&TransportError) -> bool;
    let cases: [(&str, Identity, Identity, Is, Is); 6] = [
        (
            "client expired",
            alpha(Validity::Past),
            beta(Validity::Now),
            |e| matches!(e, E::OursExpired { .. }),
            |e| matches!(e, E::PeerExpired { .. }),
        ),
        (
            "server expired",
            alpha(Validity::Now),
            beta(Validity::Past),
            |e| matches!(e, E::PeerExpired { .. }),
            |e| matches!(e, E::OursExpired { .. }),
        ),
        (
            "client not valid yet",
            alpha(Validity::Future),
            beta(Validity::Now),
            |e| e.is_certificate(),
            |e| matches!(e, E::PeerNotYetValid { .. }),
        ),
        (
            "server not valid yet",
            alpha(Validity::Now),
            beta(Validity::Future),
            |e| matches!(e, E::PeerNotYetValid { .. }),
            |e| e.is_certificate(),
        ),
        (
            "client foreign",
            stranger("alpha"),
            beta(Validity::Now),
            |e| matches!(e, E::OursForeign { .. }),
            |e| matches!(e, E::PeerForeign { .. }),
        ),
        (
            "server foreign",
            alpha(Validity::Now),
            stranger("beta"),
            |e| matches!(e, E::PeerForeign { .. }),
            |e| matches!(e, E::OursForeign { .. }),
        ),
    ];
    for (case, client, server, client_says, server_says) in cases {
        let (client, server) =
            meet(&dialer(client), &acceptor(server), "beta", Role::Control).await;
        let (client, server) = (client.expect_err(case), server.expect_err(case));
        assert!(client_says(&client), "{case}: client says {client:?}");
        assert!(server_says(&server), "{case}: server says {server:?}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_turned_away() {
    let authority = Authority::new();
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject;
    let ca = rustls::pki_types::CertificateDer::from_pem_file(authority.ca()).expect("CA");
    roots.add(ca).expect("a root");
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![crate::protocol::ALPN.to_vec()];
    let acceptor = acceptor(authority.identity("beta"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let client = async {
        let tcp = TcpStream::connect(address).await.expect("TCP");
        let name = rustls::pki_types::ServerName::try_from("beta").expect("a name");
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        let mut tls = connector.connect(name, tcp).await.expect("client side of TLS 1.3");
        let mut answer = [0; 32];
        tls.write_all(&[0; 32]).await.expect("hello");
        tls.read_exact(&mut answer).await.expect_err("turned away").to_string()
    };
    let server = async {
        let (tcp, _) = listener.accept().await.expect("a client");
        acceptor.accept(tcp).await.expect_err("no certificate")
    };
    let (told, server) = tokio::join!(client, server);
    assert!(matches!(server, TransportError::PeerWithoutCertificate { .. }), "{server:?}");
    assert!(told.contains("CertificateRequired"), "{told}");
}

#[tokio::test]
async fn versions_that_do_not_meet_say_so_in_words() {
    let authority = Authority::new();
    let newer = Acceptor::new(authority.identity("beta"), Versions { min: 2, max: 3 });
    let (client, server) =
        meet(&dialer(authority.identity("alpha")), &newer, "beta", Role::Control).await;
    let client = client.expect_err("no version in common").to_string();
    let server = server.expect_err("no version in common").to_string();
    assert!(client.contains("Peer speaks protocol 2 to 3, this build 1"), "{client}");
    assert!(server.contains("Peer speaks protocol 1, this build 2 to 3"), "{server}");

    let both = Acceptor::new(authority.identity("beta"), Versions { min: 1, max: 3 });
    let (client, _server) =
        meet(&dialer(authority.identity("alpha")), &both, "beta", Role::Control).await;
    assert_eq!(client.expect("version 1 in common").version(), 1);
}

#[tokio::test]
async fn a_full_agent_says_that_it_is_busy() {
    let authority = Authority::new();
    let dialer = dialer(authority.identity("alpha"));
    let acceptor = acceptor(authority.identity("beta")).with_limit(1);
    let (first, kept) = meet(&dialer, &acceptor, "beta", Role::Control).await;
    let (first, kept) = (first.expect("room for one"), kept.expect("room for one"));
    let (second, refused) = meet(&dialer, &acceptor, "beta", Role::Control).await;
    assert!(matches!(second.expect_err("full"), TransportError::Busy { .. }));
    assert!(matches!(refused.expect_err("full"), TransportError::Busy { .. }));
    drop((first, kept));
    let (third, _held) = meet(&dialer, &acceptor, "beta", Role::Control).await;
    third.expect("room again");
}

#[tokio::test]
async fn nobody_unknown_and_strangers_are_told_apart() {
    let authority = Authority::new();
    let dialer = dialer(authority.identity("alpha"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address").to_string();
    let to = PeerAddress { name: "beta".into(), address };
    let stranger = async {
        let (mut tcp, _) = listener.accept().await.expect("a client");
        tcp.write_all(b"220 mail.example ESMTP\r\n").await.expect("a greeting");
        let _ = tcp.read(&mut [0; 1024]).await;
    };
    let (dialled, ()) = tokio::join!(dialer.dial(&to, Role::Control, LIMIT), stranger);
    assert!(matches!(dialled.expect_err("no TLS"), TransportError::NotDecamp { .. }));

    // A port that is taken, so that no other test listens there by chance.
    let silent = tokio::net::TcpSocket::new_v4().expect("a socket");
    silent.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let address = silent.local_addr().expect("its address").to_string();
    let to = PeerAddress { name: "beta".into(), address };
    let nobody = dialer.dial(&to, Role::Control, LIMIT).await.expect_err("nobody");
    assert!(matches!(nobody, TransportError::NobodyListens { .. }), "{nobody:?}");

    let to = PeerAddress { name: "nowhere".into(), address: "nowhere.invalid:7420".into() };
    let unknown = dialer.dial(&to, Role::Control, LIMIT).await.expect_err("unknown");
    assert!(matches!(unknown, TransportError::HostUnknown { .. }), "{unknown:?}");
}

#[tokio::test]
async fn a_silent_listener_runs_into_the_deadline() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address").to_string();
    let to = PeerAddress { name: "beta".into(), address };
    let dialled = dialer(authority.identity("alpha"))
        .dial(&to, Role::Control, Duration::from_millis(200))
        .await
        .expect_err("silence");
    assert!(
        matches!(dialled, TransportError::Deadline { doing: "the TLS handshake", .. }),
        "{dialled:?}"
    );
}

#[test]
fn credentials_that_do_not_fit_are_named() {
    let authority = Authority::new();
    let (certificate, _) = authority.issue("alpha", Validity::Now);
    let (_, other_key) = authority.issue("alpha", Validity::Now);
    let missing = authority.ca().with_file_name("missing.pem");
    let load = |ca: &Path, certificate: &Path, key: &Path| {
        Identity::load(ca, certificate, key).expect_err("useless")
    };
    assert!(matches!(
        load(&missing, &certificate, &other_key),
        TransportError::CredentialFile { what: "CA certificate", .. }
    ));
    assert!(matches!(
        load(&authority.ca(), &other_key, &other_key),
        TransportError::CredentialUseless { what: "certificate", .. }
    ));
    assert!(matches!(
        load(&authority.ca(), &certificate, &other_key),
        TransportError::CredentialUseless { what: "key", .. }
    ));
    assert_eq!(authority.identity("alpha").name(), "alpha");
}

async fn control_pair() -> (Control, Control) {
    let authority = Authority::new();
    let (client, server) = meet(
        &dialer(authority.identity("alpha")),
        &acceptor(authority.identity("beta")),
        "beta",
        Role::Control,
    )
    .await;
    (Control::new(client.expect("client")), Control::new(server.expect("server")))
}

#[tokio::test]
async fn messages_arrive_whole_and_the_end_is_no_error() {
    let (mut client, mut server) = control_pair().await;
    let long = Refusal { code: 1, text: "x".repeat(3 << 20) };
    let send = async {
        client.send(&long).await.expect("sent");
        client.send(&Refusal::default()).await.expect("an empty message");
        let (_reader, mut writer) = client.split();
        writer.close().await.expect("closed");
    };
    let receive = async {
        assert_eq!(server.recv::<Refusal>(LIMIT).await.expect("first"), Some(long.clone()));
        assert_eq!(server.recv::<Refusal>(LIMIT).await.expect("second"), Some(Refusal::default()));
        assert_eq!(server.recv::<Refusal>(LIMIT).await.expect("the end"), None);
    };
    tokio::join!(send, receive);
}

#[tokio::test]
async fn a_connection_that_is_cut_is_an_error() {
    let (client, mut server) = control_pair().await;
    drop(client);
    let cut = server.recv::<Refusal>(LIMIT).await.expect_err("cut");
    assert!(matches!(cut, TransportError::Ended { .. }), "{cut:?}");
}

#[tokio::test]
async fn a_receive_that_lost_a_race_goes_on_where_it_stopped() {
    let (mut client, server) = control_pair().await;
    let (mut reader, mut writer) = server.split();
    let message = Refusal { code: 2, text: "y".repeat(100_000) };
    for _ in 0..20 {
        let early = tokio::time::timeout(Duration::from_micros(50), reader.recv::<Refusal>(LIMIT));
        assert!(early.await.is_err());
    }
    let sending = async { client.send(&message).await.expect("sent") };
    let receiving = async {
        loop {
            let part = reader.recv::<Refusal>(LIMIT);
            if let Ok(done) = tokio::time::timeout(Duration::from_micros(20), part).await {
                return done.expect("a message");
            }
        }
    };
    let ((), got) = tokio::join!(sending, receiving);
    assert_eq!(got, Some(message));
    let late = reader.recv::<Refusal>(Duration::from_millis(30)).await.expect_err("silence");
    assert!(matches!(late, TransportError::Deadline { .. }));
    writer.send(&Refusal::default()).await.expect("the writer is not harmed");
}

#[tokio::test]
async fn oversized_and_senseless_messages_are_refused() {
    let (mut client, _server) = control_pair().await;
    let huge = Refusal { code: 0, text: "z".repeat(control::MESSAGE_CAP) };
    let refused = client.send(&huge).await.expect_err("too long");
    assert!(matches!(refused, TransportError::TooLong { .. }));
    client.send(&Refusal::default()).await.expect("nothing was sent of the long one");

    type Is = fn(&TransportError) -> bool;
    let frames: [(Vec<u8>, Is); 2] = [
        (vec![0xff; 4], |e| matches!(e, TransportError::TooLong { .. })),
        (vec![2, 0, 0, 0, 0xff, 0xff], |e| matches!(e, TransportError::Message { .. })),
    ];
    for (frame, expected) in frames {
        let authority = Authority::new();
        let (client, server) = meet(
            &dialer(authority.identity("alpha")),
            &acceptor(authority.identity("beta")),
            "beta",
            Role::Control,
        )
        .await;
        let mut client = client.expect("client");
        let mut server = Control::new(server.expect("server"));
        client.stream.write_all(&frame).await.expect("written");
        client.stream.flush().await.expect("flushed");
        let refused = server.recv::<Refusal>(LIMIT).await.expect_err("refused");
        assert!(expected(&refused), "{refused:?}");
    }
}

#[tokio::test]
async fn a_stream_must_prove_that_it_belongs_to_the_session() {
    let authority = Authority::new();
    let secret = Secret::random().expect("randomness");
    let other = Secret::random().expect("randomness");
    let alpha = dialer(authority.identity("alpha"));
    let beta = acceptor(authority.identity("beta"));
    let stranger = Peer { name: "alpha".into(), fingerprint: [0; 32] };
    // (secret shown, peer of the control connection, encrypted as the client has it, refusal)
    let cases = [
        (&other, None, true, JoinRefusal::NotYours),
        (&secret, Some(stranger), true, JoinRefusal::NotYours),
        (&secret, None, false, JoinRefusal::Encryption),
    ];
    for (shown, control_peer, encrypted, expected) in cases {
        let (client, server) = meet(&alpha, &beta, "beta", Role::Page).await;
        let (client, server) = (client.expect("client"), server.expect("server"));
        let session = Uuid::from_bytes([3; 16]);
        let join = Join { session, secret: shown.clone(), index: 5, encrypted };
        let admit = async {
            let joining = server.joining().await.expect("a join");
            assert_eq!((joining.session(), joining.index()), (session, 5));
            let peer = control_peer.unwrap_or_else(|| joining.peer().clone());
            joining.admit(&secret, &peer, true).await.expect_err("refused")
        };
        let (joined, refused) = tokio::join!(client.join(&join), admit);
        match (joined.expect_err("refused"), refused) {
            (
                TransportError::NotJoined { reason: told, .. },
                TransportError::JoinRefused { reason, .. },
            ) => assert_eq!((told, reason), (expected, expected)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn leaving_tls_tolerates_no_byte_too_many() {
    let authority = Authority::new();
    let secret = Secret::random().expect("randomness");
    let alpha = dialer(authority.identity("alpha"));
    let beta = acceptor(authority.identity("beta"));
    let mut join = vec![1; 16];
    join.extend_from_slice(secret.as_bytes());
    join.extend_from_slice(&[0, 0, 0, 0, 2]);
    join.resize(join::JOIN_LEN, 0);
    // In the join's own TLS record, in one after it, or bare bytes that are not the right ones.
    for case in 0..3 {
        let (client, server) = meet(&alpha, &beta, "beta", Role::Page).await;
        let (mut client, server) = (client.expect("client"), server.expect("server"));
        let early = async {
            let stream = &mut client.stream;
            let mut first = join.clone();
            first.resize(join::JOIN_LEN + usize::from(case == 0), 0);
            stream.write_all(&first).await.expect("join");
            stream.flush().await.expect("flushed");
            if case == 1 {
                stream.write_all(&[0; 32]).await.expect("too early");
                stream.flush().await.expect("flushed");
            }
            if case == 2 {
                stream.read_exact(&mut [0; join::JOIN_ANSWER_LEN]).await.expect("an answer");
                stream.get_mut().0.write_all(&[0; 16]).await.expect("bare bytes");
            }
            let _ = stream.read(&mut [0; 64]).await;
        };
        let admit = async {
            let joining = server.joining().await.expect("a join");
            let peer = joining.peer().clone();
            joining.admit(&secret, &peer, false).await.expect_err("bytes too many")
        };
        let (refused, ()) = tokio::join!(admit, early);
        assert!(matches!(refused, TransportError::JoinBroken { .. }), "case {case}: {refused:?}");
    }
}

#[test]
fn streams_carry_bytes_both_ways_with_and_without_tls() {
    for encrypted in [true, false] {
        for (mut client, mut server) in stream_pairs(Role::Page, encrypted, 2) {
            assert_eq!(client.is_encrypted(), encrypted);
            assert_eq!(client.index(), server.index());
            let data: Vec<u8> = (0..3_000_001u32).map(|i| ((i * 7) >> 3) as u8).collect();
            let sent = data.clone();
            let writer = std::thread::spawn(move || {
                let (left, right) = sent.split_at(1_234_567);
                let mut slices = [IoSlice::new(left), IoSlice::new(&[]), IoSlice::new(right)];
                client.write_slices(&mut slices).expect("written");
                let mut echo = [0; 5];
                assert!(client.read_next(&mut echo).expect("an answer"));
                assert_eq!(&echo, b"thank");
                client.end_writing().expect("ended");
            });
            let mut got = vec![0; data.len()];
            server.read_exact(&mut got).expect("read");
            assert!(got == data);
            server.write_all(b"thank").expect("answered");
            assert!(!server.read_next(&mut [0; 4]).expect("an orderly end"));
            writer.join().expect("the writer");
        }
    }
}

#[test]
fn a_blocked_stream_is_cancelled_at_once() {
    for encrypted in [true, false] {
        for writing in [true, false] {
            takes_less_than_a_second(|| cancelled(encrypted, writing));
        }
    }
}

/// How long it takes to cancel a stream that is blocked.
fn cancelled(encrypted: bool, writing: bool) -> Duration {
    let (mut client, server) = stream_pairs(Role::Page, encrypted, 1).pop().expect("a pair");
    let canceller = client.canceller();
    let (report, reported) = mpsc::channel();
    let blocked = std::thread::spawn(move || {
        let result = loop {
            let once = if writing {
                client.write_all(&[0; 1 << 20])
            } else {
                client.read_exact(&mut [0; 1])
            };
            if once.is_err() {
                break once;
            }
        };
        report.send(()).expect("the test waits");
        result
    });
    assert!(reported.recv_timeout(Duration::from_millis(300)).is_err(), "not blocked");
    let start = Instant::now();
    canceller.cancel();
    let error = blocked.join().expect("the thread").expect_err("cancelled");
    let took = start.elapsed();
    assert!(matches!(error, TransportError::Cancelled { .. }), "{error:?}");
    drop(server);
    took
}

#[test]
fn a_stall_is_an_error_but_an_idle_peer_is_not() {
    for encrypted in [true, false] {
        let (mut client, mut server) =
            stream_pairs(Role::Page, encrypted, 1).pop().expect("a pair");
        server.set_stall_limit(Duration::from_millis(50)).expect("a limit");
        let sender = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            client.write_all(b"ab").expect("written");
            client
        });
        assert!(server.read_next(&mut [0; 2]).expect("late, and welcome"));
        let stalled = server.read_exact(&mut [0; 1]).expect_err("a stall");
        assert!(matches!(stalled, TransportError::Deadline { .. }), "{stalled:?}");
        drop(sender.join());
        let ended = server.read_exact(&mut [0; 1]).expect_err("gone");
        assert!(matches!(ended, TransportError::Ended { .. }), "{ended:?}");
    }
}

#[test]
fn tls_that_was_tampered_with_is_refused() {
    let (client, mut server) = stream_pairs(Role::Page, true, 1).pop().expect("a pair");
    let mut record = vec![0x17, 3, 3, 0, 64];
    record.extend_from_slice(&[0xaa; 64]);
    let mut socket = client.raw_socket();
    socket.write_all(&record).expect("written");
    server.read_exact(&mut [0; 1]).expect_err("not authentic");
    drop(client);
}

#[test]
fn a_runtime_that_ends_does_not_end_its_streams() {
    // `stream_pairs` has dropped its runtime when it returns.
    let (mut client, mut server) = stream_pairs(Role::File, true, 1).pop().expect("a pair");
    client.write_all(b"x").expect("written");
    server.read_exact(&mut [0; 1]).expect("read");
}
