//! [`RouteError`]: why a request never becomes an action.

use api_server::Method;

use crate::config::ConfigError;

/// Why a request is answered 400 without reaching the control thread.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No such resource, or not with this method.
    #[error("Invalid request method and/or path: {method} {path}.")]
    NotFound {
        /// The request's method.
        method: Method,
        /// The part of the path that decided.
        path: String,
    },
    /// No such resource below one that is there.
    #[error("Unrecognized {method} request path `{path}`.")]
    SubPath {
        /// The request's method.
        method: Method,
        /// The part of the path that decided.
        path: String,
    },
    /// The resource exists in the API and not yet in Mayfly.
    #[error("{method} /{path} is not supported by this version of Mayfly.")]
    Unsupported {
        /// The request's method.
        method: Method,
        /// The resource.
        path: String,
    },
    /// The resource has no such part.
    #[error("Unrecognized {method} request path `{path}`.")]
    Unrecognized {
        /// The request's method.
        method: Method,
        /// The part of the path that decided.
        path: String,
    },
    /// A body where none may be, or none where one must be.
    #[error("{0}")]
    Body(&'static str),
    /// The body is not the JSON that the resource takes.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(serde_json::Error),
    /// The id in the path breaks the rules.
    #[error("{0}")]
    Id(ConfigError),
    /// Path and body disagree.
    #[error("{0}")]
    IdMismatch(String),
    /// A value that only the device knows to be wrong.
    #[error("{0}")]
    Config(String),
}
