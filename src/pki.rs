//! Certificates for hosts: an authority of one's own and what it issues. Files only; what a
//! certificate is good for is checked by the transport.
//!
//! In the directory: `ca.pem`, `ca.key`, and for each host `NAME.pem`, `NAME.key`. Keys are readable
//! by their owner alone, and nothing that exists is ever overwritten.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::messages::is_host_name;

const AUTHORITY_DAYS: i64 = 3650;
const HOST_DAYS: i64 = 365;
/// Certificates are valid from a little earlier, for hosts whose clocks are behind.
const CLOCK_SLACK: Duration = Duration::hours(1);

/// What can go wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PkiError {
    /// It exists already.
    #[error("{0} exists already and is never overwritten: move it away if you want a new one")]
    Exists(PathBuf),
    /// There is no authority.
    #[error("There is no authority in {0}: make one with `decamp pki init {0}`")]
    NoAuthority(PathBuf),
    /// Not the name of a host.
    #[error(
        "{0:?} cannot be the name of a host: use letters, digits, dots and hyphens, at most 63"
    )]
    Name(String),
    /// A file could not be read or written.
    #[error("Cannot {what} {path}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
    /// A certificate could not be made.
    #[error("Cannot make a certificate for {name}")]
    Certificate { name: String, source: rcgen::Error },
    /// The authority's files are not what they should be.
    #[error("Cannot use the authority in {dir}")]
    Authority { dir: PathBuf, source: rcgen::Error },
}

/// A certificate and its key, as files.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Issued {
    /// The certificate.
    pub(crate) certificate: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

/// Makes an authority in `dir`, which is created when missing.
///
/// # Errors
/// When there is one already, or files cannot be written.
pub(crate) fn init(dir: &Path) -> Result<Issued, PkiError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::File {
        what: "create the directory",
        path: dir.to_owned(),
        source,
    })?;
    let failed = |source| PkiError::Certificate { name: "the authority".into(), source };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "decamp authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, AUTHORITY_DAYS);
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    write_pair(dir, "ca", &certificate.pem(), &key.serialize_pem())
}

/// Issues a certificate for the host `name`, good for both ends of a connection, with `addresses`
/// (IP addresses or DNS names) beside the name.
///
/// # Errors
/// When there is no authority, the host has a certificate already, or files cannot be written.
pub(crate) fn issue(dir: &Path, name: &str, addresses: &[String]) -> Result<Issued, PkiError> {
    if !is_host_name(name) || name == "ca" {
        return Err(PkiError::Name(name.to_owned()));
    }
    let issuer = load_authority(dir)?;
    let failed = |source| PkiError::Certificate { name: name.to_owned(), source };
    let mut names = vec![name.to_owned()];
    names.extend(addresses.iter().filter(|address| *address != name).cloned());
    let mut params = CertificateParams::new(names).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, HOST_DAYS);
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?;
    write_pair(dir, name, &certificate.pem(), &key.serialize_pem())
}

fn load_authority(dir: &Path) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let read = |file: &str| {
        let path = dir.join(file);
        fs::read_to_string(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => PkiError::NoAuthority(dir.to_owned()),
            _ => PkiError::File { what: "read", path, source },
        })
    };
    let wrong = |source| PkiError::Authority { dir: dir.to_owned(), source };
    let key = KeyPair::from_pem(&read("ca.key")?).map_err(wrong)?;
    Issuer::from_ca_cert_pem(&read("ca.pem")?, key).map_err(wrong)
}

fn valid_for(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SLACK;
    params.not_after = now + Duration::days(days);
}

/// Writes both or neither.
fn write_pair(dir: &Path, stem: &str, certificate: &str, key: &str) -> Result<Issued, PkiError> {
    let issued = Issued {
        certificate: dir.join(format!("{stem}.pem")),
        key: dir.join(format!("{stem}.key")),
    };
    if issued.certificate.exists() {
        return Err(PkiError::Exists(issued.certificate));
    }
    write_new(&issued.key, 0o600, key)?;
    if let Err(error) = write_new(&issued.certificate, 0o644, certificate) {
        // Ours, made a moment ago; a key without a certificate would only stand in the way.
        let _ = fs::remove_file(&issued.key);
        return Err(error);
    }
    Ok(issued)
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), PkiError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists(path.to_owned()),
        _ => PkiError::File { what: "write", path: path.to_owned(), source },
    };
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|source| {
        // Half a key is worse than none.
        let _ = fs::remove_file(path);
        PkiError::File { what: "write", path: path.to_owned(), source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use x509_parser::prelude::*;

    fn parsed(path: &Path, check: impl FnOnce(&X509Certificate<'_>)) {
        let pem = fs::read(path).expect("the certificate");
        let (_, pem) = parse_x509_pem(&pem).expect("PEM");
        check(&pem.parse_x509().expect("a certificate"));
    }

    #[test]
    fn an_authority_issues_certificates_for_both_ends() {
        let dir = tempfile::tempdir().expect("a directory");
        let ca = init(dir.path()).expect("an authority");
        let host = issue(dir.path(), "alpha", &["10.77.0.1".into(), "alpha.example".into()])
            .expect("a certificate");
        for key in [&ca.key, &host.key] {
            let mode = fs::metadata(key).expect("the key").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        parsed(&ca.certificate, |ca| {
            assert!(ca.is_ca());
            let days = (ca.validity().not_after.timestamp() - ca.validity().not_before.timestamp())
                / 86_400;
            assert_eq!(days, AUTHORITY_DAYS);
        });
        let authority = fs::read(&ca.certificate).expect("the authority");
        let (_, authority) = parse_x509_pem(&authority).expect("PEM");
        let authority = authority.parse_x509().expect("a certificate");
        parsed(&host.certificate, |host| {
            host.verify_signature(Some(authority.public_key())).expect("signed by the authority");
            let names = host.subject_alternative_name().expect("readable").expect("there");
            assert!(names.value.general_names.contains(&GeneralName::DNSName("alpha")));
            assert!(names.value.general_names.contains(&GeneralName::IPAddress(&[10, 77, 0, 1])));
            let usage = host.extended_key_usage().expect("readable").expect("there");
            assert!(usage.value.server_auth && usage.value.client_auth);
            assert!(!host.is_ca());
        });
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().expect("a directory");
        init(dir.path()).expect("an authority");
        let before = fs::read(dir.path().join("ca.key")).expect("the key");
        assert!(matches!(init(dir.path()), Err(PkiError::Exists(_))));
        assert_eq!(fs::read(dir.path().join("ca.key")).expect("the key"), before);
        issue(dir.path(), "alpha", &[]).expect("a certificate");
        assert!(matches!(issue(dir.path(), "alpha", &[]), Err(PkiError::Exists(_))));
        // A certificate without its key: no new key appears beside it.
        fs::remove_file(dir.path().join("alpha.key")).expect("removed");
        assert!(matches!(issue(dir.path(), "alpha", &[]), Err(PkiError::Exists(_))));
        assert!(!dir.path().join("alpha.key").exists());
    }

    #[test]
    fn a_name_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        init(dir.path()).expect("an authority");
        for bad in ["../alpha", "a/b", "", "ca"] {
            assert!(matches!(issue(dir.path(), bad, &[]), Err(PkiError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn without_an_authority_it_says_how_to_make_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = issue(dir.path(), "alpha", &[]).expect_err("no authority");
        assert!(error.to_string().contains("decamp pki init"), "{error}");
    }
}
