//! [`Store`]: the document that guests read.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

/// A document that may be replaced at any time, of bounded size.
///
/// Readers get the document as it was when they asked, and keep nobody waiting: the lock is held only for the exchange
/// of a pointer. There is one writer, the control thread.
#[derive(Debug)]
pub struct Store {
    document: Mutex<Option<Arc<Value>>>,
    limit: usize,
}

/// Why the store was not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nobody has put a document yet.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// The new document is longer than allowed.
    #[error("The MMDS patch request doesn't fit.")]
    TooLarge,
}

impl Store {
    /// An empty store for documents of at most `limit` bytes, written as compact JSON.
    pub fn new(limit: usize) -> Self {
        Self {
            document: Mutex::default(),
            limit,
        }
    }

    /// Whether a document was put.
    pub fn is_initialized(&self) -> bool {
        self.lock().is_some()
    }

    /// The document; an empty object as long as there is none.
    pub fn get(&self) -> Arc<Value> {
        let document = self.lock().clone();
        document.unwrap_or_else(|| Arc::new(empty()))
    }

    /// Replaces the document.
    pub fn put(&self, document: Value) -> Result<(), StoreError> {
        let document = if document.is_null() { empty() } else { document };
        if !fits(&document, self.limit) {
            return Err(StoreError::TooLarge);
        }
        // The old document is dropped after the lock, by whoever needs it last.
        let _old = self.lock().replace(Arc::new(document));
        Ok(())
    }

    /// Changes the document as a JSON merge patch says (RFC 7396).
    pub fn patch(&self, patch: Value) -> Result<(), StoreError> {
        if !self.is_initialized() {
            return Err(StoreError::NotInitialized);
        }
        let mut document = self.get().as_ref().clone();
        merge(&mut document, patch);
        self.put(document)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Value>>> {
        self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn empty() -> Value {
    Value::Object(Map::new())
}

/// RFC 7396 §2. Recurses as deep as the patch, which its parser bounds.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(changes) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = empty();
    }
    let Value::Object(members) = target else {
        unreachable!("made an object above")
    };
    for (key, change) in changes {
        if change.is_null() {
            members.remove(&key);
        } else {
            merge(members.entry(key).or_insert(Value::Null), change);
        }
    }
}

/// Takes as many bytes as there is room for, and keeps none.
struct Room(usize);

impl Write for Room {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.0.checked_sub(bytes.len());
        self.0 = left.ok_or(io::ErrorKind::WriteZero)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn fits(document: &Value, limit: usize) -> bool {
    serde_json::to_writer(Room(limit), document).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn store_of(document: Value) -> Store {
        let store = Store::new(1000);
        store.put(document).unwrap();
        store
    }

    /// The document after this patch.
    fn patched(document: Value, patch: Value) -> Value {
        let store = store_of(document);
        store.patch(patch).unwrap();
        store.get().as_ref().clone()
    }

    #[test]
    fn is_an_empty_object_at_first() {
        let store = Store::new(10);
        assert_eq!((&*store.get(), store.is_initialized()), (&json!({}), false));
    }

    #[test]
    fn takes_any_document_and_null_as_an_empty_object() {
        for document in [json!([1, "a"]), json!(5), json!("text"), json!({"a": {}})] {
            assert_eq!(*store_of(document.clone()).get(), document);
        }
        let store = store_of(Value::Null);
        assert_eq!((&*store.get(), store.is_initialized()), (&json!({}), true));
    }

    #[test]
    fn a_patch_adds_replaces_and_removes_members() {
        let document = json!({"keep": 1, "change": "old", "drop": true});
        let patch = json!({"change": "new", "drop": null, "add": [null], "absent": null});
        assert_eq!(
            patched(document, patch),
            json!({"keep": 1, "change": "new", "add": [null]})
        );
    }

    #[test]
    fn a_patch_reaches_into_objects_and_replaces_everything_else() {
        let document = json!({"disk": {"size": 8, "tags": ["a", "b"]}, "name": "vm"});
        let patch = json!({"disk": {"tags": ["c"], "size": null}, "name": {"first": "v", "last": null}});
        assert_eq!(
            patched(document, patch),
            json!({"disk": {"tags": ["c"]}, "name": {"first": "v"}})
        );
    }

    #[test]
    fn a_patch_that_is_no_object_replaces_the_document_and_the_reverse() {
        assert_eq!(patched(json!({"a": 1}), json!([1])), json!([1]));
        assert_eq!(patched(json!([1]), json!({"a": 1, "b": null})), json!({"a": 1}));
    }

    #[test]
    fn a_patch_leaves_nulls_that_it_does_not_name() {
        assert_eq!(
            patched(json!({"a": null}), json!({"b": 1})),
            json!({"a": null, "b": 1})
        );
    }

    #[test]
    fn a_null_patch_empties_the_document() {
        assert_eq!(patched(json!({"a": 1}), Value::Null), json!({}));
    }

    #[test]
    fn refuses_to_patch_what_was_never_put() {
        let store = Store::new(100);
        assert_eq!(store.patch(json!({"a": 1})), Err(StoreError::NotInitialized));
        assert!(!store.is_initialized());
    }

    #[test]
    fn holds_exactly_as_many_bytes_as_allowed() {
        let store = Store::new(r#"{"a":"bcd"}"#.len());
        assert_eq!(store.put(json!({"a": "bcd"})), Ok(()));
        assert_eq!(store.put(json!({"a": "bcde"})), Err(StoreError::TooLarge));
        assert_eq!(*store.get(), json!({"a": "bcd"}));
    }

    #[test]
    fn a_patch_that_does_not_fit_changes_nothing() {
        let store = Store::new(16);
        store.put(json!({"a": "bcd"})).unwrap();
        assert_eq!(store.patch(json!({"b": "cdef"})), Err(StoreError::TooLarge));
        assert_eq!(*store.get(), json!({"a": "bcd"}));
        assert_eq!(store.patch(json!({"a": "bcdef"})), Ok(()));
    }

    #[test]
    fn a_reader_keeps_the_document_that_it_has_got() {
        let store = store_of(json!({"a": 1}));
        let read = store.get();
        store.put(json!({"a": 2})).unwrap();
        assert_eq!((&*read, &*store.get()), (&json!({"a": 1}), &json!({"a": 2})));
    }
}
