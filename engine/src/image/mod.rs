//! Images: the schema, its containers, and where they are kept.

mod store;

pub use store::{ImageSink, ImageSource};
