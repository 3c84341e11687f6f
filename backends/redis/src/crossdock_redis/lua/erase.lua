-- Makes a queue disappear with all that is in it.
--
-- KEYS[1]      prefix of the queue
-- returns      1

for _, member in ipairs(redis.call('ZRANGE', P .. 'x', 0, -1)) do redis.call('UNLINK', P .. 'g' .. batch_of(member)) end
redis.call('UNLINK', P .. 'b', P .. 'r9', P .. 'r6', P .. 'r3', P .. 'r0', P .. 's', P .. 'd', P .. 'x', P .. 'l', P .. 'gh', P .. 'q',
  P .. 'w9', P .. 'w6', P .. 'w3', P .. 'w0')
return 1
