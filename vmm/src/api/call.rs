//! [`Call`]: a request on its way, from its arrival to its answer.

use std::sync::Arc;
use std::time::Instant;

use api_server::{Request, Responder, Response, Stream};

use super::requests::{Endpoint, RequestMetrics};

/// A client that waits for its answer. It is logged and counted at both ends.
#[derive(Debug)]
pub struct Call {
    responder: Responder,
    metrics: Arc<RequestMetrics>,
    endpoint: Endpoint,
    start: Instant,
    deprecated: bool,
}

impl Call {
    /// Takes a request in.
    pub fn begin(request: &Request, responder: Responder, metrics: &Arc<RequestMetrics>) -> Self {
        log_request(request);
        let endpoint = Endpoint::of(request);
        metrics.begin(endpoint);
        Self {
            responder,
            metrics: Arc::clone(metrics),
            endpoint,
            start: Instant::now(),
            deprecated: false,
        }
    }

    /// The answer is to carry `Deprecation: true`, or not.
    pub fn deprecated(self, deprecated: bool) -> Self {
        Self { deprecated, ..self }
    }

    /// Answers it.
    pub fn answer(self, response: Response) {
        log_response(&response);
        self.finish(response.status() >= 400);
        self.responder.send(if self.deprecated {
            response.deprecated()
        } else {
            response
        });
    }

    /// Answers it with a stream.
    pub fn stream(self, content_type: &'static str) -> Stream {
        log_success("200 OK");
        self.finish(false);
        self.responder.stream(content_type)
    }

    fn finish(&self, failed: bool) {
        let time = self.start.elapsed();
        self.metrics.finish(self.endpoint, time, failed, self.deprecated);
    }
}

fn log_request(request: &Request) {
    if !log::log_enabled!(log::Level::Info) {
        return;
    }
    let method = match request.method {
        api_server::Method::Get => "Get",
        api_server::Method::Put => "Put",
        api_server::Method::Patch => "Patch",
        api_server::Method::Delete => "Delete",
    };
    let path = &request.path;
    let resource = path.trim_start_matches('/').split('/').next();
    // Metadata may be secret; CPU templates are long, and of interest to those who write them.
    let is_secret = resource == Some("mmds");
    let too_long = resource == Some("cpu-config") && !log::log_enabled!(log::Level::Debug);
    match &request.body {
        Some(body) if !is_secret && !too_long => {
            let body = String::from_utf8_lossy(body);
            log::info!("The API server received a {method} request on {path:?} with body {body:?}.");
        }
        _ => log::info!("The API server received a {method} request on {path:?}."),
    }
}

fn log_response(response: &Response) {
    match response.status() {
        200 => log_success("200 OK"),
        204 => log_success("204 No Content"),
        status => {
            let body = String::from_utf8_lossy(response.body().unwrap_or_default());
            let reason = if status == 413 {
                "Payload Too Large"
            } else {
                "Bad Request"
            };
            log::error!("Received Error. Status code: {status} {reason}. Message: {body}");
        }
    }
}

fn log_success(status: &str) {
    log::info!("The request was executed successfully. Status code: {status}.");
}
