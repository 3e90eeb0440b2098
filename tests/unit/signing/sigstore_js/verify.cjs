// Verifies a bundle with sigstore-js. usage: node verify.cjs TRUSTED_ROOT BUNDLE IDENTITY ISSUER [ARTIFACT]
const fs = require('fs');
const { bundleFromJSON } = require('@sigstore/bundle');
const { TrustedRoot } = require('@sigstore/protobuf-specs');
const { Verifier, toSignedEntity, toTrustMaterial } = require('@sigstore/verify');

const [root, bundle, identity, issuer, artifact] = process.argv.slice(2);
const json = (path) => JSON.parse(fs.readFileSync(path));
const verifier = new Verifier(toTrustMaterial(TrustedRoot.fromJSON(json(root))));
const entity = toSignedEntity(bundleFromJSON(json(bundle)), artifact && fs.readFileSync(artifact));
verifier.verify(entity, { subjectAlternativeName: identity, extensions: { issuer } });
console.log('verified');
