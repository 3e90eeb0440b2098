// Signs with sigstore-js at a private instance, on Rekor v1. usage: node sign.cjs URL TOKEN FILE OUT [dsse]
const fs = require('fs');
const { bundleToJSON } = require('@sigstore/bundle');
const { DSSEBundleBuilder, FulcioSigner, MessageSignatureBundleBuilder, RekorWitness } = require('@sigstore/sign');

const [url, token, file, out, kind] = process.argv.slice(2);
const options = {
  signer: new FulcioSigner({ fulcioBaseURL: url, identityProvider: { getToken: async () => token } }),
  witnesses: [new RekorWitness({ rekorBaseURL: url, entryType: kind === 'dsse' ? 'dsse' : 'hashedrekord' })],
};
const builder = kind === 'dsse' ? new DSSEBundleBuilder(options) : new MessageSignatureBundleBuilder(options);
builder
  .create({ data: fs.readFileSync(file), type: 'application/vnd.in-toto+json' })
  .then((bundle) => fs.writeFileSync(out, JSON.stringify(bundleToJSON(bundle))));
