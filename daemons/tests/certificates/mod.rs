//! Certificates for tests, made by openssl.

use std::path::{Path, PathBuf};
use std::process::Command;

fn openssl(dir: &Path, args: &[&str]) {
    let output = Command::new("openssl").args(args).current_dir(dir).output();
    let output = output.expect("cannot run openssl; install the Debian package openssl");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

/// A directory with an authority.
pub fn authority(dir: PathBuf) -> PathBuf {
    std::fs::create_dir(&dir).unwrap();
    let name = format!("/CN={}", dir.file_name().unwrap().to_str().unwrap());
    let ca = ["-x509", "-days", "2", "-subj", &name, "-keyout", "ca-key.pem", "-out", "ca-cert.pem"];
    let uses = ["-addext", "keyUsage=critical,keyCertSign,digitalSignature"];
    openssl(&dir, &[&["req"], &KEY[..], &ca[..], &uses[..]].concat());
    dir
}

/// Puts a certificate of `who` on `localhost` that is good for some days, signed by the authority in `ca`, into `dir`.
pub fn certificate(ca: &Path, dir: &Path, who: &str, days: &str) {
    let file = |end: &str| format!("{who}-{end}.pem");
    let (key, request, out) = (file("key"), file("request"), file("cert"));
    openssl(dir, &[&["req"], &KEY[..], &["-subj", "/CN=node", "-keyout", &key, "-out", &request]].concat());
    std::fs::write(dir.join("ext"), "basicConstraints=critical,CA:FALSE\nsubjectAltName=DNS:localhost\n")
        .unwrap();
    let (cert, cakey) = (ca.join("ca-cert.pem"), ca.join("ca-key.pem"));
    let signer = ["-CA", cert.to_str().unwrap(), "-CAkey", cakey.to_str().unwrap(), "-CAcreateserial"];
    let sign = ["x509", "-req", "-in", &request, "-days", days, "-extfile", "ext", "-out", &out];
    openssl(dir, &[&sign[..], &signer[..]].concat());
}

/// A directory of a client that trusts the authority in `trusts`.
pub fn client(dir: PathBuf, trusts: &Path) -> PathBuf {
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(trusts.join("ca-cert.pem"), dir.join("ca-cert.pem")).unwrap();
    dir
}
