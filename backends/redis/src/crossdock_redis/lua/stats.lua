-- Counts a queue's messages by state.
--
-- KEYS[1]      prefix of the queue
-- returns      nil: ask again, time has more to do. {}: no such queue.
--              Else {ready, scheduled, leased, dead, since, dropped, now}: since when, in ms, the oldest ready message is ready; -1: none

if redis.call('EXISTS', P .. 'q') == 0 then return {} end
if catch_up(P) then return false end
local since, ghosts = -1, 0
for _, level in ipairs({9, 6, 3, 0}) do
  while true do
    local id = redis.call('LINDEX', P .. 'r' .. level, 0)
    if not id then break end
    local value = redis.call('HGET', P .. 'b', id)
    if value then
      local own = since_of(value)
      if since < 0 or own < since then since = own end
      break
    end
    if ghosts == BATCH then return false end
    ghosts = ghosts + 1
    redis.call('LPOP', P .. 'r' .. level)
    redis.call('HDEL', P .. 'gh', id)
    redis.call('HINCRBY', P .. 'q', 'h' .. level, 1)
  end
end
return {ready_count(P), redis.call('ZCARD', P .. 's'), redis.call('SCARD', P .. 'l'), redis.call('ZCARD', P .. 'd'), since,
  tonumber(redis.call('HGET', P .. 'q', 'dropped') or 0), now}
