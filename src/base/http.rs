//! Requests over HTTP.

use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::typestate::AgentScope;

#[cfg(feature = "https")]
use super::error::Error;
use super::error::Result;

/// The variable of the environment that names a PEM file of certificates to trust instead of Mozilla's, as for OpenSSL.
#[cfg(feature = "https")]
const CERTIFICATES: &str = "SSL_CERT_FILE";

/// An agent, as `configure` sets it, that returns answers of every status and trusts the certificates of the environment.
///
/// Errors: `Error::Io` when the file of certificates cannot be read; `Error::Invalid` when it holds none.
pub fn http_agent(configure: impl FnOnce(ConfigBuilder<AgentScope>) -> ConfigBuilder<AgentScope>) -> Result<Agent> {
    let config = configure(Agent::config_builder().http_status_as_error(false));
    #[cfg(feature = "https")]
    let config = match trusted()? {
        Some(roots) => config.tls_config(ureq::tls::TlsConfig::builder().root_certs(roots).build()),
        None => config,
    };
    Ok(config.build().into())
}

/// The certificates that the environment names; `None` for those of Mozilla.
#[cfg(feature = "https")]
fn trusted() -> Result<Option<ureq::tls::RootCerts>> {
    use ureq::tls::{PemItem, RootCerts, parse_pem};

    let Some(path) = std::env::var_os(CERTIFICATES).filter(|path| !path.is_empty()) else { return Ok(None) };
    let path = std::path::PathBuf::from(path);
    let pem = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
    let subject = || format!("`{}`, which {CERTIFICATES} names,", path.display());
    let remedy = "expected a PEM file of certificates";
    let mut found = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(one) =
            item.map_err(|e| Error::invalid(subject(), format!("does not decode: {e}")).remedy(remedy))?
        {
            found.push(one);
        }
    }
    match found.is_empty() {
        true => Err(Error::invalid(subject(), "holds no certificate").remedy(remedy)),
        false => Ok(Some(RootCerts::Specific(found.into()))),
    }
}
