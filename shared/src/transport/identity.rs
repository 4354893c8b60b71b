//! Who this host is, and whom it believes: certificates, keys and the TLS settings made of them.
//!
//! TLS 1.3 only, certificates on both sides from one authority, ALPN `decamp`, no resumption (a
//! session has few connections, and each proves itself afresh).

use std::path::Path;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::error::TransportError;
use crate::protocol::ALPN;

/// Certificates of one file that are looked at; a longer chain is refused.
const CHAIN_CAP: usize = 16;
/// Longest name that a certificate may give its owner, as DNS has it.
const NAME_CAP: usize = 253;

/// The other end of a connection, as its certificate says. Two connections with the same
/// fingerprint were opened with the same certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Host name: the first DNS name of the certificate, or its common name.
    pub name: String,
    /// SHA-256 of the certificate (DER).
    pub fingerprint: [u8; 32],
}

impl Peer {
    /// Reads the owner out of a certificate that has been verified already.
    pub(super) fn of(certificate: &[u8], address: &str) -> Result<Self, TransportError> {
        match owner(certificate) {
            Ok(name) => Ok(Self { name, fingerprint: Sha256::digest(certificate).into() }),
            Err(reason) => {
                Err(TransportError::PeerCertificate { peer: address.to_owned(), reason })
            }
        }
    }
}

/// This host's certificate and key, and the authority that it trusts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Identity {
    name: String,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads PEM files: the authority's certificate, this host's certificate (with its chain, if
    /// it has one) and its key. The certificate must serve as a client's and as a server's.
    ///
    /// # Errors
    /// When a file cannot be read, holds nothing usable, or key and certificate do not match.
    pub fn load(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, TransportError> {
        let useless = |what, path: &Path, reason: String| TransportError::CredentialUseless {
            what,
            path: path.to_owned(),
            reason,
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("CA certificate", ca)? {
            roots.add(root).map_err(|e| useless("CA certificate", ca, e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates("certificate", certificate)?;
        let name = owner(&chain[0]).map_err(|e| useless("certificate", certificate, e))?;
        let key_der = PrivateKeyDer::from_pem_file(key).map_err(|source| {
            TransportError::CredentialFile { what: "key", path: key.to_owned(), source }
        })?;

        let provider = Arc::new(provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| useless("CA certificate", ca, e.to_string()))?;
        let versions: &[_] = &[&rustls::version::TLS13];
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(|e| useless("certificate", certificate, e.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key_der.clone_key())
            .map_err(|e| useless("key", key, e.to_string()))?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|e| useless("certificate", certificate, e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key_der)
            .map_err(|e| useless("key", key, e.to_string()))?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;
        Ok(Self { name, client: Arc::new(client), server: Arc::new(server) })
    }

    /// The name in this host's own certificate.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }
}

/// ring's provider, with AES-128-GCM first: page data is bound by the cipher, and its margin is the
/// one that TLS 1.3 makes mandatory.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider
}

fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let failed = |source| TransportError::CredentialFile { what, path: path.to_owned(), source };
    let useless = |reason: &str| TransportError::CredentialUseless {
        what,
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .take(CHAIN_CAP + 1)
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    match found.len() {
        0 => Err(useless("it holds no certificate")),
        n if n > CHAIN_CAP => Err(useless("it holds too many certificates")),
        _ => Ok(found),
    }
}

/// The host that a certificate was issued to.
fn owner(certificate: &[u8]) -> Result<String, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    let alternative = parsed.subject_alternative_name().map_err(|e| e.to_string())?;
    let dns = alternative.and_then(|names| {
        names.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(dns) => Some((*dns).to_owned()),
            _ => None,
        })
    });
    let common = || {
        let name = parsed.subject().iter_common_name().next()?;
        name.as_str().ok().map(str::to_owned)
    };
    let name = dns.or_else(common).ok_or("it names no host")?;
    if name.is_empty() || name.len() > NAME_CAP || !name.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("its host name is not a name".to_owned());
    }
    Ok(name)
}
