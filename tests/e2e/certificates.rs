//! Certificates as no `decamp pki` would make them: expired, of another authority, with another name.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use time::{Duration, OffsetDateTime};

/// A certificate with its key and the authority that its owner trusts, as files.
pub(crate) struct Papers {
    pub(crate) ca: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

/// Writes `STEM.pem` and `STEM.key` into `dir`: a certificate for `name` from the hosts' own authority, valid
/// until so many days from now.
pub(crate) fn issue(authority: &Path, dir: &Path, stem: &str, name: &str, days: i64) -> Papers {
    let read = |file| fs::read_to_string(authority.join(file)).expect("the hosts' authority");
    let key = KeyPair::from_pem(&read("ca.key")).expect("its key");
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).expect("its certificate");
    write(dir, stem, name, days, &issuer, authority.join("ca.pem"))
}

/// The same from an authority that nobody here knows; its owner trusts the hosts' own.
pub(crate) fn issue_foreign(authority: &Path, dir: &Path, stem: &str, name: &str) -> Papers {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "somebody else");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = Issuer::new(params, KeyPair::generate().expect("a key"));
    write(dir, stem, name, 365, &issuer, authority.join("ca.pem"))
}

fn write(
    dir: &Path,
    stem: &str,
    name: &str,
    days: i64,
    issuer: &Issuer<'_, KeyPair>,
    ca: PathBuf,
) -> Papers {
    let names = vec![name.to_owned(), "10.77.0.1".to_owned(), "10.77.0.2".to_owned()];
    let mut params = CertificateParams::new(names).expect("names");
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::days(30);
    params.not_after = now + Duration::days(days);
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, issuer).expect("a certificate");
    let papers = Papers {
        ca,
        certificate: dir.join(format!("{stem}.pem")),
        key: dir.join(format!("{stem}.key")),
    };
    fs::write(&papers.certificate, certificate.pem()).expect("written");
    fs::write(&papers.key, key.serialize_pem()).expect("written");
    papers
}
